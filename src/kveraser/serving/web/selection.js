// What the model has read, as text in which one can select, and what is selected. Knows characters, not tokens.

/** A view of a session's runs in an element that can be selected in by mouse and keyboard, and not be changed. */
export class TextView extends EventTarget {
  /** The selected characters, [start, end) in code points; null without any. */
  selected = null;
  runs = [];

  constructor(element) {
    super();
    this.element = element;
    element.addEventListener("beforeinput", (event) => {
      event.preventDefault();
      this.#look(); // `selectionchange` may still be on its way
      if (event.inputType.startsWith("delete") && this.selected) this.dispatchEvent(new Event("delete"));
    });
    element.addEventListener("input", () => this.#render()); // what some keyboards change all the same
    document.addEventListener("selectionchange", () => this.#look());
  }

  show(runs) {
    this.runs = runs;
    this.#render();
  }

  /** Select the first place of a text. */
  select(text) {
    const at = this.element.textContent.indexOf(text);
    if (at < 0) return;
    const range = document.createRange();
    range.setStart(...this.#place(at));
    range.setEnd(...this.#place(at + text.length));
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    this.element.scrollTop += range.getBoundingClientRect().top - this.element.getBoundingClientRect().top - 40;
  }

  /** Mark ranges of characters, [start, end) each in code points, with a named highlight; browsers without these show none. */
  mark(name, ranges) {
    if (!globalThis.Highlight) return;
    const units = [0]; // where each code point begins
    for (const character of this.element.textContent) units.push(units.at(-1) + character.length);
    const marked = ranges.map(([start, end]) => {
      const range = document.createRange();
      range.setStart(...this.#place(units[start]));
      range.setEnd(...this.#place(units[end]));
      return range;
    });
    CSS.highlights.set(name, new Highlight(...marked));
  }

  #render() {
    this.element.replaceChildren(
      ...this.runs.map((run) => {
        const part = document.createElement(run.state === "erased" ? "del" : run.new ? "ins" : "span");
        part.textContent = run.text;
        return part;
      }),
    );
    this.#choose(null);
  }

  /** Follow the selection; one that is elsewhere leaves ours as it was, so that a button can be pressed. */
  #look() {
    const selection = getSelection();
    if (!selection.rangeCount || !this.element.contains(selection.getRangeAt(0).commonAncestorContainer)) return;
    const range = selection.getRangeAt(0);
    const before = document.createRange();
    before.selectNodeContents(this.element);
    before.setEnd(range.startContainer, range.startOffset);
    const start = length(before.toString());
    const end = start + length(range.toString());
    if (`${this.selected}` !== `${end > start ? [start, end] : null}`) this.#choose(end > start ? [start, end] : null);
  }

  #choose(selected) {
    this.selected = selected;
    this.dispatchEvent(new Event("select"));
  }

  /** The text node and offset of a place in the text. */
  #place(at) {
    const walker = document.createTreeWalker(this.element, NodeFilter.SHOW_TEXT);
    let node = walker.nextNode();
    while (node.length < at) {
      at -= node.length;
      node = walker.nextNode();
    }
    return [node, at];
  }
}

const length = (text) => [...text].length; // in code points, as the server counts
