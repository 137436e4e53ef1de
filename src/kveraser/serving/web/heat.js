// Who has read what is selected: a heat over the text, and in words. Knows the text view; is told who has read by its caller.

const LEVELS = 4;
const WAIT = 300; // milliseconds that a selection must stand still

export class Heat {
  #waiting = null;
  #asking = null;

  /** `ask(characters, signal)` gives the readers of a selection; `caption` is the element that says it in words. */
  constructor(view, caption, ask) {
    Object.assign(this, { view, caption, ask });
  }

  /** Follow a selection; null takes the heat away. */
  follow(selected) {
    clearTimeout(this.#waiting);
    this.#asking?.abort();
    this.#show([], "");
    if (selected) this.#waiting = setTimeout(() => this.#look(selected), WAIT);
  }

  async #look(selected) {
    this.#asking = new AbortController();
    this.caption.textContent = "Who has read this? …";
    try {
      const { readers } = await this.ask([selected], this.#asking.signal);
      const said = readers.slice(0, 5).map(({ text, read }) => `${text.trim() || "(space)"} ${Math.round(100 * read)} %`);
      this.#show(readers, said.length ? `Has been read most by: ${said.join(", ")} (share of its attention).` : "Nothing has read this.");
    } catch (error) {
      if (error.name !== "AbortError") this.caption.textContent = `Who has read this cannot be told: ${error.message}`;
    }
  }

  #show(readers, words) {
    const most = readers[0]?.read ?? 1;
    const levels = Array.from({ length: LEVELS }, () => []);
    for (const { characters, read } of readers) {
      if (characters[1] > characters[0]) levels[Math.min(Math.floor((LEVELS * read) / most), LEVELS - 1)].push(characters);
    }
    levels.forEach((ranges, level) => this.view.mark(`heat-${level + 1}`, ranges));
    this.caption.textContent = words;
  }
}
