// Answers side by side, and the distributions behind them. Knows the events of a comparison, not where they come from.

import { bar } from "./ledger.js";

const TITLES = { before: "before", now: "now", recomputed: "full recomputation" };
export const milliseconds = (seconds) => `${Math.max(1, Math.round(1000 * seconds))} ms`;

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

export function badge(made, exact) {
  made.className = `badge ${exact ? "exact" : "approximate"}`;
  made.textContent = exact ? "exact" : "approximate";
  return made;
}

/** A card per version in `place`; returns what takes its events. */
export function answerCards(place, versions) {
  const cards = Object.fromEntries(
    versions.map((version) => {
      const card = element("article", "", version);
      const [title, said, facts] = [element("h3", TITLES[version]), element("p", "", "said"), element("p", "", "facts")];
      card.append(title, said, facts);
      return [version, { card, title, said, facts }];
    }),
  );
  place.replaceChildren(...Object.values(cards).map(({ card }) => card));
  return ({ version, done, total, text, answer }) => {
    const { title, said, facts } = cards[version];
    if (total) facts.textContent = `reading ${done} of ${total} tokens`;
    if (text) said.append(text);
    if (answer) {
      if (version === "now" && answer.methods.length) title.textContent = `now: ${answer.methods.join(", ")}`;
      title.append(badge(element("span"), answer.exact));
      said.textContent = answer.text.trim();
      facts.textContent = describe(answer);
    }
  };
}

function describe({ version, methods, edit_seconds: edit, first_seconds: first, tokens }) {
  const what = version === "recomputed" ? "full recomputation" : methods.join(", ");
  const made = edit === null ? "nothing erased" : `${what}: ${milliseconds(edit)}`;
  return `${made} · first token: ${milliseconds(first)} · ${tokens} tokens`;
}

/** A table of the next token's probability in every version, with bars. */
export function drawDistributions(place, { after, tokens, probabilities, kl }) {
  const versions = Object.keys(probabilities);
  const table = element("table");
  const behind = after ? `behind “${after}”` : "at the beginning of the answer";
  const far = Object.entries(kl).filter(([version]) => version !== "recomputed");
  const distance = far.map(([version, value]) => `${TITLES[version]} ${value.toFixed(3)}`).join(", ");
  table.append(element("caption", `Likely next tokens ${behind}${distance ? `. Distance to recomputation (KL, nats): ${distance}` : ""}`));
  const head = table.createTHead().insertRow();
  head.append(element("th", "token"), ...versions.map((version) => element("th", version, version)));
  for (const cell of head.cells) cell.scope = "col";
  const body = table.createTBody();
  tokens.forEach((token, index) => {
    const row = body.insertRow();
    const name = element("th", visible(token));
    name.scope = "row";
    row.append(name);
    for (const version of versions) {
      const cell = element("td", `${(100 * probabilities[version][index]).toFixed(1)} %`, version);
      cell.append(bar(probabilities[version][index]));
      row.append(cell);
    }
  });
  place.replaceChildren(table);
}

const visible = (token) => token.replaceAll(" ", "␣").replaceAll("\n", "⏎");
