// A variant of a new run: its name, method and objective, with the fields of both. The rows decide which objectives are offered.

import { Choice, Field, type FieldFacts, type Fields, put, Text } from "./fields";
import { type RewardFacts, Rewards, startingReward } from "./rewards";

export interface ObjectiveFacts {
  name: string;
  fields: FieldFacts[];
  /** Objectives with the same word here read rows in the same way. */
  reads: string;
  metrics: string[];
  /** What a method's learning rate is multiplied by. */
  lr_scale: number;
}

export interface Choices {
  bases: string[];
  quantize: string[];
  methods: { name: string; fields: FieldFacts[]; lr: number }[];
  objectives: ObjectiveFacts[];
  rewards: RewardFacts[];
  training: FieldFacts[];
  base: string;
  root: string;
}

export interface Variant {
  name: string;
  fields: Fields;
}

const SAYS: Record<string, string> = {
  lora: "Low-rank matrices beside the weights; the usual choice.",
  ia3: "One factor a channel; a hundredth of LoRA's size.",
  bottleneck: "A small network behind each layer (Houlsby, Pfeiffer).",
  prompt: "Learnt tokens in front of every prompt.",
  prefix: "Learnt keys and values in front of every layer.",
  full: "Every weight of the base, as a yardstick; needs the most memory.",
};
const AIMS: Record<string, string> = {
  sft: "imitate the answers",
  distil: "predict what a teacher predicts, token by token",
  grpo: "draw answers, and make those likelier that rewards rate higher",
  classify: "train a head that gives a text one of the labels",
  reward: "train a head that scores the better answer of a pair higher",
  stepwise: "train a head that tells right steps of a solution from wrong ones",
  dpo: "prefer the better of two answers, measured against the base",
  cpo: "prefer the better of two answers, without the base",
  simpo: "prefer the better of two answers, by the mean of its tokens",
  orpo: "imitate the better answer and avoid the worse one",
  kto: "raise wanted answers, lower unwanted ones",
};
const HINTS: Record<string, string> = {
  teacher: "Another base, or an adapter on this run's base: its folder, or its name in the store",
  loss_weights: "One for each loss type, with commas between them; none: 1 each",
  classes: "Labels in the order of the scores, with commas between them; none: those of the rows",
};
const FIRST = ["teacher", "classes", "num_generations", "max_completion_length", "temperature"];
const FEW = 6;

export function VariantForm({
  variant,
  known,
  rows,
  at,
  named,
  set,
  remove,
}: {
  variant: Variant;
  known: Choices;
  rows: { base: string; objectives: string[]; answered: boolean; guessed: Fields };
  at: (field: string) => string[];
  named: string[];
  set: (next: Variant) => void;
  remove: (() => void) | undefined;
}) {
  const method = known.methods.find((m) => m.name === variant.fields["method"]) ?? known.methods[0]!;
  const aim = String(variant.fields["objective"] ?? "sft");
  const objective = known.objectives.find((o) => o.name === aim);
  const offered = rows.objectives.includes(aim) ? rows.objectives : [aim, ...rows.objectives];
  const field = (name: string, value: unknown) => set({ ...variant, fields: put(variant.fields, name, value) });
  const without = (old: FieldFacts[], ...more: string[]) => Object.fromEntries(Object.entries(variant.fields).filter(([k]) => !old.some((f) => f.name === k) && k !== "lr" && !more.includes(k)));
  /** Another method or objective has other fields; those of the old one go. */
  const swapMethod = (name: string) => set({ ...variant, fields: { ...without(method.fields), method: name } });
  const swapObjective = (name: string) => {
    const kept = without(objective?.fields ?? [], "valid_metric", "objective");
    const guessed = rows.guessed;
    const asGuessed = name === (guessed["objective"] ?? "sft") && guessed["valid_metric"] !== undefined ? { valid_metric: guessed["valid_metric"] } : {};
    const needed = name === "grpo" ? { rewards: [startingReward(rows.answered)] } : name === "distil" ? { teacher: "" } : {};
    set({ ...variant, fields: { ...kept, ...(name === "sft" ? {} : { objective: name }), ...needed, ...asGuessed } });
  };
  const shown = (f: FieldFacts) => (
    <Field
      key={f.name}
      facts={f.name === "teacher" ? { ...f, default: "", says: HINTS["teacher"], words: known.bases.filter((b) => b !== rows.base) } : { ...f, says: f.says ?? HINTS[f.name] }}
      value={variant.fields[f.name]}
      errors={at(f.name)}
      set={(x) => field(f.name, f.name === "teacher" ? (x ?? "") : x)}
    />
  );
  const own = (objective?.fields ?? []).filter((f) => f.kind !== "rewards");
  const first = own.length > FEW ? own.filter((f) => FIRST.includes(f.name)) : own;
  const others = own.filter((f) => !first.includes(f));
  const lr = method.lr * (objective?.lr_scale ?? 1);
  return (
    <fieldset class="variant-form">
      <legend>
        {variant.name || "a variant"}
        {remove && (
          <button type="button" class="quiet" onClick={remove} aria-label={`Take ${variant.name} away`}>
            Take away
          </button>
        )}
      </legend>
      <div class="fields">
        <Text label="Name" value={variant.name} errors={[...named, ...at("")]} set={(name) => set({ ...variant, name })} />
        <Choice label="Method" value={method.name} words={known.methods.map((m) => m.name)} errors={at("method")} hint={SAYS[method.name]} set={swapMethod} />
        <Choice label="Objective" value={aim} words={offered} errors={at("objective")} hint={AIMS[aim]} set={swapObjective} />
        <Field
          facts={{ name: "lr", kind: "number", default: null, says: "peak learning rate" }}
          preset={String(Number(lr.toPrecision(3)))}
          value={variant.fields["lr"]}
          errors={at("lr")}
          set={(x) => field("lr", x)}
        />
        {method.fields.map(shown)}
      </div>
      {objective?.fields.some((f) => f.kind === "rewards") && (
        <Rewards known={known.rewards} value={variant.fields["rewards"]} errors={at("rewards")} set={(rewards) => field("rewards", rewards)} />
      )}
      {own.length > 0 && (
        <>
          <h3 class="of-objective">Of {aim}</h3>
          <div class="fields">{first.map(shown)}</div>
        </>
      )}
      {others.length > 0 && (
        <details open={others.some((f) => at(f.name).length > 0) || undefined}>
          <summary>More settings of {aim}</summary>
          <div class="fields">{others.map(shown)}</div>
        </details>
      )}
    </fieldset>
  );
}
