// The ledger drawn to scale: a bar as long as everything that was ever read, with what was erased marked.

const SVG = "http://www.w3.org/2000/svg";

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

export function drawLedger(svg, { tokens, runs, messages }) {
  svg.setAttribute("viewBox", `0 0 ${Math.max(tokens, 1)} 10`);
  svg.replaceChildren(
    ...runs.map(({ span: [start, end], state }) => shape("rect", { class: state, x: start, y: 0, width: end - start, height: 10 })),
    ...messages.map(({ span: [start] }) => shape("line", { class: "message", x1: start, x2: start, y1: 0, y2: 10 })),
  );
  const erased = runs.filter((run) => run.state === "erased");
  const gone = erased.reduce((sum, { span: [start, end] }) => sum + end - start, 0);
  const places = erased.map(({ span: [start, end] }) => `${start} to ${end}`).join(", ");
  const said = `${tokens} tokens, ${gone} erased${places ? ` (${places})` : ""}`;
  svg.setAttribute("aria-label", said);
  return said;
}

/** A horizontal bar from 0 to 1. */
export function bar(value) {
  const svg = shape("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
  svg.append(shape("rect", { x: 0, y: 0, width: 100 * value, height: 10 }));
  return svg;
}
