// Two rows side by side: how often only one of them is right, on which images, and what they saw.

const FIRST_SHOWN = 24;

function bits(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return (place) => (bytes[place >> 3] >> (place & 7)) & 1;
}

// The two-sided exact McNemar test: of the images that one row alone has right, each falls to
// either side as a coin does.
function mcnemar(wins, losses) {
  const n = wins + losses;
  if (!n) return 1;
  let [term, total] = [-n * Math.LN2, 0];
  for (let k = 0; k <= Math.min(wins, losses); k += 1) {
    total += Math.exp(term);
    term += Math.log(n - k) - Math.log(k + 1);
  }
  return Math.min(1, 2 * total);
}

class Comparison {
  constructor(task, onchange) {
    Object.assign(this, { task, onchange });
    this.sheets = new Map();
    this.result = element("div", { class: "result" });
    this.rows = task.rows.filter((row) => row.outcomes);
    this.node = element(
      "section",
      { class: "part compare" },
      element("h3", {}, "Compare two rows, image by image"),
      this.rows.length < 2
        ? element("p", { class: "quiet" }, "Which image each row has right was not kept in this results folder: run soups.learn again to keep it.")
        : null,
    );
    if (this.rows.length < 2) return;
    const options = this.rows.map((row, place) => [String(place), row.label]);
    const pick = (side) => choice("AB"[side], options, "", (value) => {
      const chosen = [...this.chosen];
      chosen[side] = this.rows[Number(value)];
      this.onchange(chosen);
    });
    this.fields = [pick(0), pick(1)];
    this.node.append(element("div", { class: "tools" }, this.fields.map(({ field }) => field)), this.result);
  }

  show(chosen) {
    if (!this.fields) return;
    this.chosen = chosen;
    chosen.forEach((row, side) => { this.fields[side].select.value = String(this.rows.indexOf(row)); });
    if (chosen.length < 2) {
      this.result.replaceChildren(element("p", { class: "quiet" }, "Tick two rows of the table, or choose them here."));
      return;
    }
    this.result.replaceChildren(...this.compared(chosen));
  }

  compared([a, b]) {
    if (a === b) return [element("p", { class: "quiet" }, "A and B are the same row.")];
    if (a.outcomes.images !== b.outcomes.images) {
      return [element("p", { class: "quiet" }, "These two were measured on different report images: they cannot be compared one by one.")];
    }
    const set = this.task.images[a.outcomes.images];
    const [rightA, rightB] = [bits(a.outcomes.right), bits(b.outcomes.right)];
    let [wins, losses] = [0, 0];
    for (let place = 0; place < set.count; place += 1) {
      if (rightA(place) > rightB(place)) wins += 1;
      if (rightA(place) < rightB(place)) losses += 1;
    }
    const difference = (wins - losses) / set.count;
    const p = mcnemar(wins, losses);
    const sentence = element(
      "p",
      { class: "flips" },
      `Of ${grouped(set.count)} report images, `,
      element("strong", { class: "a" }, grouped(wins)),
      ` are right only with A, ${a.label}, and `,
      element("strong", { class: "b" }, grouped(losses)),
      ` only with B, ${b.label}: `,
      `${written("points", difference)} points, p ${p < 0.001 ? "< 0.001" : `= ${fixed(p, 3)}`}`,
      " by the exact McNemar test of this one pair.",
    );
    const shown = set.shown.map((image, place) => ({ image, place }));
    const only = (one, other) => shown.filter(({ image }) => one(image) > other(image));
    return [
      sentence,
      this.split(wins, losses, set.count),
      this.gallery(`Only A is right: ${a.label}`, "a", wins, only(rightA, rightB), [a, b], set),
      this.gallery(`Only B is right: ${b.label}`, "b", losses, only(rightB, rightA), [a, b], set),
    ];
  }

  // The images that flip, as parts of one line.
  split(wins, losses) {
    const n = wins + losses || 1;
    const width = 100;
    return svg(
      "svg",
      { class: "split", viewBox: `0 0 ${width} 2`, preserveAspectRatio: "none", "aria-hidden": "true" },
      svg("rect", { class: "a", x: 0, y: 0, width: (width * wins) / n, height: 2 }),
      svg("rect", { class: "b", x: (width * wins) / n, y: 0, width: (width * losses) / n, height: 2 }),
    );
  }

  gallery(title, side, count, found, rows, set) {
    const list = element("ul", { class: "images" });
    const add = (from, to) => list.append(...found.slice(from, to).map((one) => this.tile(one, rows, set)));
    add(0, FIRST_SHOWN);
    const rest = found.length - FIRST_SHOWN;
    const more = rest > 0
      ? element("button", { type: "button", onclick: () => {
          add(FIRST_SHOWN, found.length);
          list.children[FIRST_SHOWN].tabIndex = -1;
          list.children[FIRST_SHOWN].focus();
          more.remove();
        } }, `Show ${rest} more`)
      : null;
    const kept = found.length < count ? `; ${found.length ? grouped(found.length) : "none"} of them ${found.length === 1 ? "was" : "were"} kept as pictures` : "";
    return element(
      "section",
      { class: `gallery ${side}` },
      element("h4", {}, `${title} `, element("span", { class: "quiet" }, `${grouped(count)} image${count === 1 ? "" : "s"}${kept}`)),
      list,
      more,
    );
  }

  tile({ image, place }, rows, set) {
    const label = set.classes[set.labels[place]];
    const guess = (row, side) => {
      const predicted = row.outcomes.predicted?.[place];
      if (predicted === undefined) return null;
      const right = predicted === set.labels[place];
      return element(
        "span",
        { class: right ? "guess" : "guess wrong" },
        element("b", { class: side }, side.toUpperCase()),
        element("span", {}, ` ${set.classes[predicted]} `),
        element("small", {}, `${row.outcomes.confidence[place]}%`),
      );
    };
    return element(
      "li",
      {},
      this.picture(set, place, label, image),
      element("span", { class: "label" }, label),
      guess(rows[0], "a"),
      guess(rows[1], "b"),
    );
  }

  picture(set, place, label, image) {
    const [width, height] = set.tile;
    const canvas = element("canvas", { width, height, role: "img", "aria-label": `image ${image}: ${label}` });
    const draw = (sheet) => canvas.getContext("2d").drawImage(
      sheet, (place % set.across) * width, Math.floor(place / set.across) * height, width, height, 0, 0, width, height,
    );
    if (!this.sheets.has(set)) {
      const sheet = new Image();
      sheet.src = set.sheet;
      this.sheets.set(set, sheet.decode().then(() => sheet));
    }
    this.sheets.get(set).then(draw);
    return canvas;
  }
}
