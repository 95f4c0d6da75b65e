// Tools that answers may call: their definitions as JSON, checked as they are typed, and which may or must be called.

import { Options } from "../parts";

export interface Tool {
  type: "function";
  function: { name: string; description?: string; parameters?: object };
}

export const EXAMPLE_PROMPT = "Where is my order 10428? I would like to cancel it if it has not left yet.";
const EXAMPLE: Tool[] = [
  {
    type: "function",
    function: {
      name: "get_order",
      description: "Where an order is, and whether it can still be cancelled.",
      parameters: { type: "object", properties: { order_id: { type: "string", description: "as it stands on the invoice" } }, required: ["order_id"] },
    },
  },
  {
    type: "function",
    function: {
      name: "cancel_order",
      description: "Cancel an order that has not left yet.",
      parameters: {
        type: "object",
        properties: { order_id: { type: "string" }, reason: { enum: ["changed_mind", "too_late", "other"] } },
        required: ["order_id"],
      },
    },
  },
];
const MOST = 128;

const isObject = (x: unknown): x is Record<string, unknown> => typeof x === "object" && x !== null && !Array.isArray(x);

/** The tools that a text defines, or what is wrong with it. The server checks the schemas. */
export function read(text: string): { tools: Tool[]; wrong: string[] } {
  if (!text.trim()) return { tools: [], wrong: [] };
  let given: unknown;
  try {
    given = JSON.parse(text);
  } catch (error) {
    return { tools: [], wrong: [`This is not JSON yet: ${error instanceof Error ? error.message : String(error)}`] };
  }
  if (!Array.isArray(given)) return { tools: [], wrong: ["Give a list of tools: put [ and ] around them."] };
  const names = new Set<string>();
  const wrong = given.flatMap((tool, i) => problems(tool, `Tool ${i + 1}`, names));
  if (given.length > MOST) wrong.push(`There are ${given.length} tools; the server takes ${MOST} at most.`);
  return wrong.length ? { tools: [], wrong } : { tools: given as Tool[], wrong: [] };
}

function problems(tool: unknown, place: string, names: Set<string>): string[] {
  if (!isObject(tool)) return [`${place} is no object.`];
  if (tool.type !== "function" || !isObject(tool.function)) return [`${place} needs the form {"type": "function", "function": {"name": …, "parameters": …}}.`];
  const { name, description, parameters } = tool.function;
  if (typeof name !== "string" || !/^[A-Za-z0-9_.-]{1,64}$/.test(name)) return [`${place}: function.name must be 1 to 64 letters, digits, _ . or -.`];
  const wrong = names.has(name) ? [`${place}: another tool is called ${name} too.`] : [];
  names.add(name);
  if (description !== undefined && description !== null && typeof description !== "string") wrong.push(`${place} (${name}): description must be text.`);
  if (parameters !== undefined && parameters !== null && !isObject(parameters)) wrong.push(`${place} (${name}): parameters must be a JSON Schema, an object.`);
  return wrong;
}

interface Props {
  text: string;
  tools: Tool[];
  wrong: string[];
  choice: string;
  single: boolean;
  onText: (text: string) => void;
  onChoice: (choice: string) => void;
  onSingle: (single: boolean) => void;
  onExample: (text: string) => void;
}

export function ToolsField({ text, tools, wrong, choice, single, onText, onChoice, onSingle, onExample }: Props) {
  const told = wrong.length ? (wrong.length === 1 ? "a mistake" : `${wrong.length} mistakes`) : tools.length ? String(tools.length) : "none";
  return (
    <details class="tools">
      <summary>
        Tools: <span class={wrong.length ? "bad" : undefined}>{told}</span>
      </summary>
      <label>
        <span>Definitions, a JSON list</span>
        <textarea
          class="mono"
          rows={8}
          spellcheck={false}
          autocapitalize="off"
          value={text}
          aria-invalid={wrong.length > 0}
          aria-describedby="tools-told"
          onInput={(e) => onText(e.currentTarget.value)}
        />
      </label>
      <div id="tools-told" class={wrong.length ? "wrong" : "note"} role="status">
        {wrong.length ? wrong.slice(0, 5).map((w) => <p key={w}>{w}</p>) : tools.length ? `May be called: ${tools.map((t) => t.function.name).join(", ")}` : "As the chat route takes them."}
      </div>
      <div class="row">
        <button type="button" onClick={() => onExample(JSON.stringify(EXAMPLE, null, 2))}>
          Insert an example
        </button>
        <button type="button" class="quiet" disabled={!text} onClick={() => onText("")}>
          Clear
        </button>
      </div>
      <label>
        <span>Tool choice</span>
        <select value={choice} disabled={!tools.length} onChange={(e) => onChoice(e.currentTarget.value)}>
          <option value="auto">auto: the model decides</option>
          <option value="required">required: the first answer is a call</option>
          <Options words={["none"]} />
          {tools.map(({ function: { name } }) => (
            <option key={name} value={`name:${name}`}>
              the first answer calls {name}
            </option>
          ))}
        </select>
      </label>
      <label class="check">
        <input type="checkbox" checked={single} disabled={!tools.length} onChange={(e) => onSingle(e.currentTarget.checked)} /> one call at most in an answer
      </label>
    </details>
  );
}
