// A prompt as the model reads it, cut into the turns of a conversation again. What no known template wrote is one turn, as it is.

import { own } from "../format";

export interface Turn {
  role: string;
  text: string;
}

const TEMPLATES = [
  /<\|im_start\|>\s*(\w+)\s*\n([\s\S]*?)(?:<\|im_end\|>|$(?![\s\S]))/g,
  /<\|start_header_id\|>\s*(\w+)\s*<\|end_header_id\|>\s*([\s\S]*?)(?:<\|eot_id\|>|<\|end_of_text\|>|$(?![\s\S]))/g,
  /<start_of_turn>\s*(\w+)\s*\n([\s\S]*?)(?:<end_of_turn>|$(?![\s\S]))/g,
  /<\|(system|user|assistant)\|>\s*([\s\S]*?)(?:<\|end\|>|<\/s>|(?=<\|(?:system|user|assistant)\|>)|$(?![\s\S]))/g,
  /\[(INST)\]\s*([\s\S]*?)\s*\[\/INST\]/g,
];

export function turns(prompt: string): Turn[] {
  for (const template of TEMPLATES) {
    const found = [...prompt.matchAll(template)].map((m) => ({ role: role(m[1]!), text: m[2]!.trim() }));
    if (found.length) return found.filter((t, i) => t.text || i < found.length - 1);
  }
  return prompt.trim() ? [{ role: "prompt", text: prompt.trim() }] : [];
}

function role(name: string): string {
  return own({ model: "assistant", INST: "user" }, name) ?? name;
}
