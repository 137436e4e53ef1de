// The ledger drawn to scale: a bar as long as everything that was ever read, with what was erased marked.

const SVG = "http://www.w3.org/2000/svg";

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

export function drawLedger(svg, { tokens, runs, messages }) {
  svg.setAttribute("viewBox", `0 0 ${Math.max(tokens, 1)} 10`);
  let end = 0; // in the order of the text, which replacements change
  const drawn = runs.map((run) => ({ ...run, x: end, width: run.span[1] - run.span[0], end: (end += run.span[1] - run.span[0]) }));
  const place = (position) => drawn.map(({ span, x }) => (span[0] <= position && position < span[1] ? x + position - span[0] : -1)).find((x) => x >= 0) ?? 0;
  svg.replaceChildren(
    ...drawn.map(({ state, new: isNew, x, width }) => shape("rect", { class: isNew ? `${state} new` : state, x, y: 0, width, height: 10 })),
    ...messages.map(({ span: [start] }) => shape("line", { class: "message", x1: place(start), x2: place(start), y1: 0, y2: 10 })),
  );
  const [erased, added] = [drawn.filter((run) => run.state === "erased"), drawn.filter((run) => run.new)];
  const count = (parts) => parts.reduce((sum, { width }) => sum + width, 0);
  const places = erased.map(({ x, end }) => `${x} to ${end}`).join(", ");
  const said = `${tokens} tokens, ${count(erased)} erased${places ? ` (${places})` : ""}${added.length ? `, ${count(added)} new in their place` : ""}`;
  svg.setAttribute("aria-label", said);
  return said;
}

/** A horizontal bar from 0 to 1. */
export function bar(value) {
  const svg = shape("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
  svg.append(shape("rect", { x: 0, y: 0, width: 100 * value, height: 10 }));
  return svg;
}
