// One session on the server, and what it looks like. Knows the endpoints; tells whoever listens when something changed.

import { ApiError, call, events } from "./api.js";

const ID = "kveraser.session";
const NOTHING = { tokens: 0, live_tokens: 0, exact: true, messages: [], runs: [], erases: [], recomputed: [] };

export class Session extends EventTarget {
  shown = NOTHING;
  #id = sessionStorage.getItem(ID);

  get #path() {
    return `/v1/sessions/${this.#id}`;
  }

  get isChat() {
    return this.shown.messages.length > 0;
  }

  /** Look at it again; one that the server has no more is forgotten. */
  async refresh() {
    if (this.#id) {
      try {
        this.shown = await call("GET", this.#path);
      } catch (error) {
        if (!(error instanceof ApiError) || error.status !== 404) throw error;
        this.#become(null);
      }
    }
    if (!this.#id) this.shown = NOTHING;
    this.dispatchEvent(new Event("change"));
  }

  async readText(text) {
    await this.#open();
    await call("POST", `${this.#path}/text`, { text });
    await this.refresh();
  }

  /** Read messages: {role, content} each. */
  async readMessages(messages) {
    await this.#open();
    try {
      for (const { role, content } of messages) await call("POST", `${this.#path}/messages`, { role, content });
    } finally {
      await this.refresh();
    }
  }

  /** Erase ranges of characters of the text that is shown; returns the receipt. */
  async erase(characters, method, purge) {
    const receipt = await call("POST", `${this.#path}/erase`, { characters, method, purge });
    await this.refresh();
    return receipt;
  }

  /** Let ranges of characters of the text that is shown say something else; returns the receipt. */
  async replace(characters, text, method) {
    const receipt = await call("POST", `${this.#path}/replace`, { characters, new: text, method });
    await this.refresh();
    return receipt;
  }

  /** Who has read ranges of characters: the tokens that attended to them most. */
  readers(characters, signal) {
    return call("POST", `${this.#path}/readers`, { characters }, signal);
  }

  async restore(id) {
    const report = await call("POST", `${this.#path}/restore`, { erase: id });
    await this.refresh();
    return report;
  }

  /** Repair; tells how far it is, from 0 to 1. Returns the number of tokens that were recomputed. */
  async repair(progress) {
    let last = {};
    for await (const event of events(`${this.#path}/repair?stream=true`)) {
      if (event.total) progress(event.done / event.total);
      last = event;
    }
    await this.refresh();
    return last.tokens_recomputed;
  }

  /** The answers before the edits, now, and recomputed, as events. */
  compare(question, signal) {
    const asked = this.isChat ? { prompt: question, max_tokens: 64 } : { prompt: asText(question), max_tokens: 32, first_line: true };
    return events(`${this.#path}/compare`, { ...asked, top: 4, stream: true }, signal);
  }

  /** Go on from a question and its answer. */
  async keep(question, answer) {
    if (!this.isChat) return this.readText(`${asText(question)} ${answer.trim()}\n\n`);
    return this.readMessages([{ role: "user", content: question }, { role: "assistant", content: answer.trim() }].filter((message) => message.content));
  }

  async forget() {
    if (this.#id) await call("DELETE", this.#path).catch(() => {});
    this.#become(null);
    await this.refresh();
  }

  async #open() {
    if (!this.#id) this.#become((await call("POST", "/v1/sessions")).id);
  }

  #become(id) {
    this.#id = id;
    if (id) sessionStorage.setItem(ID, id);
    else sessionStorage.removeItem(ID);
  }
}

const asText = (question) => `\n\nQuestion: ${question}\nAnswer:`;
