// The page put together: what is pressed, what is called, what is shown then.

import { answerCards, badge, drawDistributions, milliseconds } from "./answers.js";
import { ApiError, call, setKey } from "./api.js";
import { Heat } from "./heat.js";
import { drawLedger } from "./ledger.js";
import { TextView } from "./selection.js";
import { Session } from "./session.js";

const $ = (id) => document.getElementById(id);
const session = new Session();
const view = new TextView($("context"));
const heat = new Heat(view, $("readers"), (characters, signal) => session.readers(characters, signal));
let examples = [];
let asking = null;

/** Do one thing at a time; say what went wrong. */
async function doing(what, work) {
  if (document.body.ariaBusy === "true") return;
  document.body.ariaBusy = "true";
  heat.follow(null); // what it would look at may be gone by then
  $("error").textContent = "";
  $("status").textContent = what;
  show();
  try {
    $("status").textContent = (await work()) ?? "";
  } catch (error) {
    $("status").textContent = "";
    if (error.name !== "AbortError") $("error").textContent = error.message;
    if (error instanceof ApiError && error.status === 401) {
      $("key-form").hidden = false;
      $("key").focus();
    }
  } finally {
    document.body.ariaBusy = "false";
    show();
  }
}

/** What can be pressed. */
function show() {
  const busy = document.body.ariaBusy === "true";
  for (const id of ["read", "forget", "ask"]) $(id).disabled = busy;
  $("erase").disabled = busy || !view.selected;
  $("replace").disabled = busy || !view.selected || !$("new").value;
  $("repair").disabled = busy || session.shown.exact;
  $("stop").disabled = !asking;
  for (const button of $("erases").querySelectorAll("button")) button.disabled = busy;
}

session.addEventListener("change", () => {
  const { shown } = session;
  const empty = !shown.tokens;
  $("context-section").hidden = $("ask-section").hidden = empty;
  view.show(shown.runs);
  view.mark("recomputed", shown.recomputed);
  $("ledger-caption").textContent = drawLedger($("ledger"), shown);
  badge($("exactness"), shown.exact);
  $("erases").replaceChildren(...shown.erases.map(eraseEntry));
  if (empty) $("answers").replaceChildren(), $("plot").replaceChildren();
  show();
});

function eraseEntry({ id, method, tokens_removed: tokens, replacements, seconds, exact, recomputed, residual, eraser }) {
  const entry = document.createElement("li");
  const undo = document.createElement("button");
  undo.textContent = "Undo";
  undo.className = "quiet";
  undo.addEventListener("click", () =>
    doing("Undoing …", async () => {
      const report = await session.restore(id);
      return report.bit_exact ? "Undone: every state is as it was." : `Undone: ${report.tokens_recomputed} tokens were read again.`;
    }),
  );
  const length = (spans) => spans.reduce((sum, [start, end]) => sum + end - start, 0);
  const by = replacements.length ? ` replaced by ${length(replacements)}` : "";
  const facts = [`${method}: ${tokens} tokens${by} in ${milliseconds(seconds)}`];
  const again = length(recomputed);
  if (again) facts.push(`${again} that had read it recomputed (underlined)`);
  if (!exact && residual !== null) facts.push(`${Math.round(100 * residual)} % of the attention to it left`);
  if (eraser) facts.push(`${eraser} eraser`);
  entry.append(facts.join(", "), undo);
  return entry;
}

// -- reading

$("example").addEventListener("change", () => {
  const story = examples[$("example").value];
  if (!story) return;
  $("source").value = story.prefix + story.span + story.suffix;
  $("question").value = story.question;
  $("kind").value = "text";
});

$("read-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const [kind, text] = [$("kind").value, $("source").value];
  doing("Reading …", async () => {
    if (kind === "text") await session.readText(text);
    else await session.readMessages(kind === "chat" ? messagesIn(text) : [{ role: kind, content: text }]);
    const story = examples[$("example").value];
    if (story && text.includes(story.span)) view.select(story.span);
    $("source").value = "";
    $("example").value = "";
    $("context").focus({ preventScroll: true });
    return "Read.";
  });
});

function messagesIn(text) {
  let messages;
  try {
    messages = JSON.parse(text);
  } catch (error) {
    throw new Error(`This is no JSON: ${error.message}`);
  }
  const fits = (message) => typeof message?.role === "string" && typeof message?.content === "string";
  if (!Array.isArray(messages) || !messages.length || !messages.every(fits)) throw new Error('A list of {"role": "user", "content": "..."} is needed.');
  return messages;
}

$("forget").addEventListener("click", () => doing("Forgetting …", () => session.forget()));

// -- erasing

view.addEventListener("select", () => {
  show();
  heat.follow(view.selected);
});
view.addEventListener("delete", erase);
$("erase").addEventListener("click", erase);

function erase() {
  if (!view.selected) return;
  doing("Erasing …", async () => {
    const receipt = await session.erase([view.selected], $("method").value, $("purge").checked);
    $("purge").checked = false;
    return `Erased ${receipt.tokens_removed} tokens in ${milliseconds(receipt.seconds)}${receipt.purged ? ", for good" : ""}.`;
  });
}

$("new").addEventListener("input", show);
$("replace-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!view.selected) return;
  doing("Replacing …", async () => {
    const receipt = await session.replace([view.selected], $("new").value, $("method").value);
    $("new").value = "";
    return `Replaced ${receipt.tokens_removed} tokens in ${milliseconds(receipt.seconds)}.`;
  });
});

$("repair").addEventListener("click", () =>
  doing("Repairing …", async () => {
    const progress = $("progress");
    progress.value = 0;
    progress.hidden = false;
    try {
      return `Repaired: ${await session.repair((part) => (progress.value = part))} tokens were recomputed.`;
    } finally {
      progress.hidden = true;
    }
  }),
);

// -- asking

$("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value;
  doing("Asking …", async () => {
    asking = new AbortController();
    show();
    try {
      const erased = session.shown.runs.some((run) => run.state === "erased" && run.text);
      const tell = answerCards($("answers"), erased ? ["before", "now", "recomputed"] : ["now"]);
      $("plot").replaceChildren();
      let now = "";
      for await (const event of session.compare(question, asking.signal)) {
        if (event.distributions) drawDistributions($("plot"), event.distributions);
        else tell(event);
        if (event.version === "now" && event.answer) now = event.answer.text;
      }
      if ($("keep").checked) await session.keep(question, now);
      return "Answered.";
    } finally {
      asking = null;
    }
  });
});

$("stop").addEventListener("click", () => asking?.abort());

// -- the beginning

function option(value, text) {
  const made = document.createElement("option");
  made.value = value;
  made.textContent = text;
  return made;
}

async function begin() {
  const { data: models } = await call("GET", "/v1/models");
  const { data: methods } = await call("GET", "/v1/methods");
  $("model").textContent = models[0].id;
  const able = methods.filter((method) => method.available && method.name !== "no-erase");
  $("method").replaceChildren(...able.map(({ name }) => option(name, name)));
  if (able.some(({ name }) => name === "kveraser")) $("method").value = "kveraser";
  $("key-form").hidden = true;
  await session.refresh();
  return "";
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value.trim());
  $("key").value = "";
  doing("", begin);
});

doing("", async () => {
  ({ data: examples } = await call("GET", "/v1/examples"));
  $("example").append(...examples.map((story, index) => option(String(index), story.name)));
  return begin();
});
