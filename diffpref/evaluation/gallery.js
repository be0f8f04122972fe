// The gallery of an evaluation page: filter by prompt, sort by score difference, slide between base and model.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("gallery-data").textContent);
  const byId = (id) => document.getElementById(id);
  const controls = ["model", "scorer", "sort", "group", "text"].map(byId);
  const [model, scorer, sort, group, text] = controls;
  const page = 24;
  let shown = page;

  const option = (select, value, label) => {
    const node = document.createElement("option");
    node.value = value;
    node.textContent = label;
    select.append(node);
  };
  data.models.forEach((name) => option(model, name, name));
  data.scorers.forEach((name) => option(scorer, name, name));
  option(group, "", "all");
  [...new Set(data.rows.map((row) => row.group))].filter(Boolean).forEach((name) => option(group, name, name));

  // NaN where a scorer refused one of the two pictures; such rows come last
  const difference = (row) => (row.scores[model.value][scorer.value] ?? NaN) - (row.scores[data.base][scorer.value] ?? NaN);
  const unknownLast = (compare) => (a, b) => {
    const [x, y] = [difference(a), difference(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? Number.isNaN(x) - Number.isNaN(y) : compare(x, y);
  };
  const orders = {
    best: unknownLast((x, y) => y - x),
    worst: unknownLast((x, y) => x - y),
    order: (a, b) => a.index - b.index,
  };
  const signed = (x) => (x >= 0 ? "+" : "\u2212") + Math.abs(x).toPrecision(3);

  const picture = (source, side) => {
    const image = document.createElement("img");
    image.src = source;
    image.alt = side;
    image.loading = "lazy";
    return image;
  };

  const card = (row) => {
    const figure = document.createElement("figure");
    const stage = document.createElement("div");
    stage.className = "stage";
    const over = picture(row.pictures[model.value], model.value);
    over.className = "over";
    const label = document.createElement("p");
    label.className = "side";
    const slider = document.createElement("input");
    slider.type = "range";
    slider.min = 0;
    slider.max = 100;
    slider.value = 50;
    slider.setAttribute("aria-label", "base to the right, model to the left of the line");
    const place = () => {
      over.style.clipPath = `inset(0 ${100 - slider.value}% 0 0)`;
      stage.style.setProperty("--line", `${slider.value}%`);
    };
    slider.addEventListener("input", place);
    stage.append(picture(row.pictures[data.base], data.base), over);
    place();
    label.textContent = `${model.value} | ${data.base}`;
    const caption = document.createElement("figcaption");
    const change = difference(row);
    const number = document.createElement("span");
    number.className = change > 0 ? "gain" : change < 0 ? "loss" : "muted";
    number.textContent = Number.isNaN(change) ? `${scorer.value}: not scored` : `${scorer.value} ${signed(change)}`;
    caption.append(row.prompt, document.createElement("br"), number);
    figure.append(stage, slider, label, caption);
    figure.dataset.difference = change;
    return figure;
  };

  const draw = () => {
    const wanted = text.value.trim().toLowerCase();
    const rows = data.rows
      .filter((row) => (!group.value || row.group === group.value) && row.prompt.toLowerCase().includes(wanted))
      .sort(orders[sort.value]);
    byId("cards").replaceChildren(...rows.slice(0, shown).map(card));
    byId("count").textContent = `${Math.min(shown, rows.length)} of ${rows.length} prompts`;
    byId("more").hidden = rows.length <= shown;
  };
  const redraw = () => { shown = page; draw(); };
  controls.forEach((node) => ["input", "change"].forEach((event) => node.addEventListener(event, redraw)));
  byId("more").addEventListener("click", () => { shown += page; draw(); });
  draw();
})();
