// Elements and numbers. Every text enters the page as a text node: nothing given by a person is
// ever read as HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

const element = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);

const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

const MINUS = "\u2212";
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const fixed = (value, digits) => value.toFixed(digits).replace("-", MINUS);
const grouped = (value) => Math.round(value).toLocaleString("en-US");

function secondsText(value) {
  if (value < 0.01) return "<0.01";
  return value < 10 ? fixed(value, 2) : grouped(value);
}

function bytesText(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) [value, unit] = [value / 1024, unit + 1];
  return `${value < 10 && unit ? fixed(value, 2) : value < 100 && unit ? fixed(value, 1) : fixed(value, 0)} ${units[unit]}`;
}

// Three digits, of losses as many below each other as they have; a whole number as it is.
const numberText = (value) =>
  (Number.isInteger(value) ? String(value) : value.toPrecision(3)).replace("-", MINUS);

const WRITTEN = {
  text: String,
  share: String,
  percent: (value) => fixed(100 * value, 2),
  points: (value) => (value < 0 ? "" : "+") + fixed(100 * value, 2),
  probability: (value) => (value < 0.001 ? "<0.001" : fixed(value, 3)),
  count: grouped,
  seconds: secondsText,
  bytes: bytesText,
  number: (value) => (Math.abs(value) >= 100 ? grouped(value) : numberText(value)),
};

const written = (kind, value) =>
  value === null || value === undefined || value === "" ? "" : WRITTEN[kind](value);

// A picture is one stop for the Tab key: arrows go from mark to mark (`across` of them are in a row),
// and what is there is said below it, as it is for a pointer.
function explorable(marks, across, describe, label) {
  const said = element("output", { class: "said" }, "\u00a0");
  let at = -1;
  const go = (place) => {
    if (at >= 0) marks[at].classList.remove("here");
    at = place;
    marks[at].classList.add("here");
    said.textContent = describe(at);
  };
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across };
  const attributes = {
    tabindex: 0,
    role: "application",
    "aria-roledescription": "picture",
    "aria-label": `${label}. The arrow keys go through it.`,
    onkeydown: (event) => {
      if (!(event.key in steps) || !marks.length) return;
      event.preventDefault();
      const next = at < 0 ? 0 : at + steps[event.key];
      if (next >= 0 && next < marks.length) go(next);
    },
  };
  marks.forEach((mark, place) => mark.addEventListener("pointerenter", () => go(place)));
  return { attributes, said };
}

const choice = (label, options, chosen, onchange) => {
  const select = element(
    "select",
    { "aria-label": label, onchange: () => onchange(select.value) },
    options.map(([value, text]) => element("option", { value, selected: value === chosen }, text)),
  );
  return { field: element("span", { class: "field" }, `${label} `, select), select };
};
