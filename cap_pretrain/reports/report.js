"use strict";
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const KEY = "report " + location.pathname;
  const state = { zoom: null, log: false, smooth: 0, axis: "steps" };
  const charts = [];

  function make(parent, name, attributes = {}, text = "") {
    const svg = ["svg", "g", "path", "line", "circle", "rect", "text", "title"].includes(name);
    const made = svg ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== "") made.textContent = text;
    if (parent) parent.append(made);
    return made;
  }

  // Numbers ------------------------------------------------------------------------------------
  function number(value) {
    if (value === null || value === undefined) return "not finite";
    const size = Math.abs(value);
    if (size && (size < 1e-3 || size >= 1e9)) return value.toExponential(3);
    if (Number.isInteger(value) || size >= 1e5) return Math.round(value).toLocaleString("en");
    return String(Number(value.toPrecision(5)));
  }

  function short(value) {
    const size = Math.abs(value);
    for (const [unit, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (size >= unit) return Number((value / unit).toPrecision(4)) + letter;
    if (size && size < 1e-3) return value.toExponential(1).replace(".0e", "e");
    return String(Number(value.toPrecision(4)));
  }

  function ticks(low, high, count) {
    const raw = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].find((k) => k * power >= raw) * power;
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-6; k++)
      found.push(k * step);
    return found;
  }

  function logTicks(low, high) {
    const found = [];
    const every = Math.log10(high / low) > 6 ? [1] : [1, 2, 5];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
      for (const k of every) {
        const value = k * 10 ** e;
        if (value >= low && value <= high) found.push(value);
      }
    return found.length > 1 ? found : ticks(low, high, 4).filter((value) => value > 0);
  }

  // Examples shown in the first `step` steps of a run: its batch size may change.
  function examples(run, step) {
    const sizes = page.runs[run].batches;
    let total = 0;
    sizes.forEach(([first, size], k) => {
      const end = k + 1 < sizes.length ? Math.min(sizes[k + 1][0], step) : step;
      total += size * Math.max(0, end - first);
    });
    return total;
  }

  function across(series) {
    return state.axis === "steps" ? series.x : series.x.map((x) => examples(series.run, x));
  }

  // Exponential moving average without the bias of its start (as Adam's moments).
  function smoothed(values, weight) {
    let mean = 0, mass = 0;
    return values.map((value) => {
      if (value === null) return null;
      mean = weight * mean + (1 - weight) * value;
      mass = weight * mass + (1 - weight);
      return mean / mass;
    });
  }

  function nearest(xs, x) {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return x - xs[low] <= xs[high] - x ? low : high;
  }

  // A chart ------------------------------------------------------------------------------------
  class Chart {
    constructor(figure) {
      this.figure = figure;
      this.data = page.charts[Number(figure.dataset.chart)];
      this.legend();
      this.svg = make(null, "svg", { tabindex: "0", role: "img", "aria-label": this.label() });
      figure.querySelector("figcaption").after(this.svg);
      this.tip = make(figure, "div", { class: "tip" });
      this.tip.hidden = true;
      this.voice = make(figure, "p", { class: "unseen", "aria-live": "polite" });
      this.svg.addEventListener("pointermove", (event) => this.move(event));
      this.svg.addEventListener("pointerdown", (event) => this.press(event));
      this.svg.addEventListener("pointerup", (event) => this.release(event));
      this.svg.addEventListener("pointerleave", () => { if (this.from === undefined) this.leave(); });
      this.svg.addEventListener("dblclick", () => zoom(null));
      this.svg.addEventListener("blur", () => this.leave());
      this.svg.addEventListener("keydown", (event) => this.key(event));
    }

    label() {
      const summary = this.figure.querySelector(".summary");
      return `${this.data.title}. ${summary ? summary.textContent : ""} ` +
        "Left and right arrows read values, plus and minus zoom, Escape shows all.";
    }

    legend() {
      if (this.data.series.length < 2) return;
      const legend = make(this.figure, "div", { class: "legend" });
      for (const series of this.data.series) {
        const item = make(legend, "span", { class: `k${series.color}` });
        const key = make(item, "svg", { viewBox: "0 0 22 8", "aria-hidden": "true" });
        make(key, "line", { class: `line d${series.dash}`, x1: 0, x2: 22, y1: 4, y2: 4 });
        item.append(series.name);
      }
    }

    prepare() {
      this.log = state.log && this.data.logs;
      this.lines = this.data.series.map((series) => {
        const x = across(series);
        const smooth = state.smooth && series.noisy;
        return { ...series, x, raw: series.y, smooth,
          y: smooth ? smoothed(series.y, state.smooth) : series.y };
      });
      const ends = this.lines.filter((line) => line.x.length)
        .flatMap((line) => [line.x[0], line.x[line.x.length - 1]]);
      this.x0 = Math.min(...ends);
      this.x1 = Math.max(...ends);
      if (state.zoom) {
        [this.x0, this.x1] = state.zoom;
      } else if (this.x0 === this.x1) {
        this.x0 -= 1;
        this.x1 += 1;
      }
      const shown = [];
      for (const line of this.lines)
        line.x.forEach((x, k) => {
          for (const y of [line.raw[k], line.y[k]])
            if (x >= this.x0 && x <= this.x1 && y !== null && (!this.log || y > 0)) shown.push(y);
        });
      let low = shown.reduce((a, b) => Math.min(a, b), Infinity);
      let high = shown.reduce((a, b) => Math.max(a, b), -Infinity);
      if (!shown.length) [low, high] = this.log ? [0.1, 1] : [0, 1];
      const pad = this.log ? 0 : (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
      this.y0 = this.log ? low / 1.08 : low >= 0 ? Math.max(0, low - pad) : low - pad;
      this.y1 = this.log ? high * 1.08 : high + pad;
    }

    draw() {
      const width = Math.max(200, this.svg.clientWidth || this.figure.clientWidth - 20);
      const height = this.figure.classList.contains("first") ? 280 : 190;
      this.prepare();
      const marks = this.log ? logTicks(this.y0, this.y1) : ticks(this.y0, this.y1, height / 45);
      const letters = Math.max(2, ...marks.map((y) => short(y).length));
      const [left, right, top, bottom] = [16 + 6.5 * letters, width - 12, 8, height - 22];
      Object.assign(this, { left, right, top, bottom });
      const along = (x) => left + (x - this.x0) / (this.x1 - this.x0) * (right - left);
      const scale = this.log ? Math.log : (y) => y;
      const span = scale(this.y1) - scale(this.y0);
      const up = (y) => bottom - (scale(y) - scale(this.y0)) / span * (bottom - top);
      Object.assign(this, { along, up });
      this.svg.replaceChildren();
      this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      this.svg.setAttribute("height", height);
      for (const y of marks) {
        make(this.svg, "line", { class: "grid", x1: left, x2: right, y1: up(y), y2: up(y) });
        make(this.svg, "text", { x: left - 6, y: up(y) + 4, "text-anchor": "end" }, short(y));
      }
      for (const x of ticks(this.x0, this.x1, Math.max(2, Math.min(8, width / 90)))) {
        if (this.data.whole && !Number.isInteger(x)) continue;
        const anchor = along(x) > right - 14 ? "end" : "middle";
        make(this.svg, "text", { x: along(x), y: height - 6, "text-anchor": anchor }, short(x));
      }
      for (const line of this.lines) {
        if (line.smooth) this.path(line.x, line.raw, `line faint k${line.color} d${line.dash}`);
        this.path(line.x, line.y, `line k${line.color} d${line.dash}`);
        if (line.x.length <= 12) this.points(line);
      }
      for (const mark of this.data.marks) this.mark(mark);
      this.over = make(this.svg, "g");
    }

    path(xs, ys, name) {
      const { along, up } = this;
      let text = "", pen = false;
      const inside = (x) => x >= this.x0 && x <= this.x1;
      xs.forEach((x, k) => {
        const y = ys[k];
        const near = inside(x) || (k && inside(xs[k - 1])) || (k + 1 < xs.length && inside(xs[k + 1]));
        if (y === null || !near || (this.log && y <= 0)) {
          pen = false;
          return;
        }
        const at = Math.min(Math.max(along(x), -1e4), 1e4);
        text += `${pen ? "L" : "M"}${at.toFixed(1)} ${up(y).toFixed(1)}`;
        pen = true;
      });
      const box = `polygon(${this.left}px 0, ${this.right}px 0, ${this.right}px 999px, ${this.left}px 999px)`;
      make(this.svg, "path", { class: name, d: text }).style.clipPath = state.zoom ? box : "";
    }

    points(line) {
      line.x.forEach((x, k) => {
        const y = line.y[k];
        if (y === null || x < this.x0 || x > this.x1 || (this.log && y <= 0)) return;
        make(this.svg, "circle", { class: `dot k${line.color}`, r: 3, cx: this.along(x), cy: this.up(y) });
      });
    }

    mark({ run, x: step, y, text }) {
      const x = state.axis === "steps" ? step : examples(run, step);
      if (x < this.x0 || x > this.x1) return;
      const [a, b] = [this.along(x), Math.max(this.top + 9, this.up(Math.min(y, this.y1)))];
      const sign = make(this.svg, "path", { class: "spike", d: `M${a - 5} ${b - 9}h10l-5 8z` });
      make(sign, "title", {}, text);
    }

    // Pointer and keyboard ---------------------------------------------------------------------
    at(event) {
      const box = this.svg.getBoundingClientRect();
      const inside = Math.min(Math.max(event.clientX - box.left, this.left), this.right);
      return this.x0 + (inside - this.left) / (this.right - this.left) * (this.x1 - this.x0);
    }

    move(event) {
      const x = this.at(event);
      this.show(x);
      if (this.from === undefined) return;
      const [a, b] = [this.from, x].sort((p, q) => p - q).map(this.along);
      make(this.over, "rect", { class: "band", x: a, width: b - a, y: this.top, height: this.bottom - this.top });
    }

    press(event) {
      if (event.pointerType === "touch" || event.button) return this.show(this.at(event));
      this.from = this.at(event);
      this.svg.setPointerCapture(event.pointerId);
    }

    release(event) {
      if (this.from === undefined) return;
      const [a, b] = [this.from, this.at(event)].sort((p, q) => p - q);
      this.from = undefined;
      if (this.along(b) - this.along(a) > 6) zoom([a, b]);
    }

    leave() {
      this.cursor = undefined;
      this.tip.hidden = true;
      this.over.replaceChildren();
    }

    show(x) {
      const found = [];
      for (const line of this.lines) {
        if (!line.x.length) continue;
        const k = nearest(line.x, x);
        if (line.x[k] < this.x0 || line.x[k] > this.x1) continue;
        found.push({ line, x: line.x[k], y: line.raw[k] });
      }
      this.over.replaceChildren();
      if (!found.length) return "";
      const here = found.reduce((a, b) => Math.abs(b.x - x) < Math.abs(a.x - x) ? b : a).x;
      this.cursor = here;
      const a = this.along(here);
      make(this.over, "line", { class: "cursor", x1: a, x2: a, y1: this.top, y2: this.bottom });
      for (const { line, x: own, y } of found)
        if (y !== null && (!this.log || y > 0))
          make(this.over, "circle", { class: `dot k${line.color}`, r: 4, cx: this.along(own), cy: this.up(y) });
      this.tip.replaceChildren();
      make(this.tip, "div", { class: "soft" }, `${state.axis.replace(/s$/, "")} ${number(here)}`);
      const body = make(make(this.tip, "table"), "tbody");
      found.sort((p, q) => (q.y ?? -Infinity) - (p.y ?? -Infinity));
      for (const { line, x: own, y } of found.slice(0, 12)) {
        const row = make(body, "tr", { class: `k${line.color}` });
        make(make(row, "td"), "span", { class: "run" }, line.name);
        make(row, "td", { class: "n" }, number(y) + (own === here ? "" : ` at ${number(own)}`));
      }
      this.tip.hidden = false;
      const beside = a > (this.left + this.right) / 2;
      const most = this.figure.clientWidth - this.tip.offsetWidth - 4;
      const [inner, outer] = [this.svg, this.figure].map((part) => part.getBoundingClientRect());
      const place = inner.left - outer.left + a + (beside ? -this.tip.offsetWidth - 12 : 12);
      this.tip.style.left = `${Math.max(4, Math.min(most, place))}px`;
      this.tip.style.top = `${inner.top - outer.top + this.top}px`;
      return this.tip.innerText;
    }

    key(event) {
      const longest = this.lines.reduce((a, b) => b.x.length > a.x.length ? b : a);
      const xs = longest.x.filter((x) => x >= this.x0 && x <= this.x1);
      if (!xs.length) return;
      const now = this.cursor === undefined ? -1 : nearest(xs, this.cursor);
      const moves = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: xs.length - 1 };
      if (event.key in moves) {
        const next = Math.min(Math.max(moves[event.key], 0), xs.length - 1);
        this.voice.textContent = this.show(xs[next]);
      } else if (event.key === "+" || event.key === "-") {
        const half = (this.x1 - this.x0) * (event.key === "+" ? 0.25 : 1);
        const middle = this.cursor ?? (this.x0 + this.x1) / 2;
        zoom([middle - half, middle + half]);
      } else if (event.key === "Escape") {
        zoom(null);
      } else {
        return;
      }
      event.preventDefault();
    }
  }

  // The page -----------------------------------------------------------------------------------
  function redraw() {
    for (const chart of charts) if (chart.figure.offsetParent) chart.draw();
  }

  function zoom(range) {
    state.zoom = range;
    for (const button of document.querySelectorAll(".reset")) button.disabled = !range;
    redraw();
  }

  function control(selector, event, apply) {
    const found = document.querySelector(selector);
    if (found) found.addEventListener(event, () => { apply(found); redraw(); });
    return found;
  }

  function restore() {
    const kept = JSON.parse(sessionStorage.getItem(KEY) || "null");
    sessionStorage.removeItem(KEY);
    if (!kept) return;
    Object.assign(state, kept.state);
    const log = document.getElementById("log"), axis = document.getElementById("axis");
    if (log) log.checked = state.log;
    if (axis) axis.value = state.axis;
    const smooth = document.getElementById("smooth");
    if (smooth) smooth.value = state.smooth * 100;
    requestAnimationFrame(() => { zoom(state.zoom); scrollTo(0, kept.scroll); });
  }

  async function refresh() {
    if (document.visibilityState !== "visible") return;
    try {
      const text = await (await fetch(location.href, { cache: "no-store" })).text();
      const version = /"version":"([0-9a-f]+)"/.exec(text);
      if (!version || version[1] === page.version) return;
      sessionStorage.setItem(KEY, JSON.stringify({ state, scroll: scrollY }));
      location.reload();
    } catch { /* The server has ended; the page stays as it is. */ }
  }

  for (const figure of document.querySelectorAll("[data-chart]")) charts.push(new Chart(figure));
  control("#log", "change", (box) => { state.log = box.checked; });
  control("#smooth", "input", (slider) => { state.smooth = slider.value / 100; });
  control("#axis", "change", (menu) => { state.axis = menu.value; state.zoom = null; });
  for (const button of document.querySelectorAll(".reset"))
    button.addEventListener("click", () => zoom(null));
  for (const details of document.querySelectorAll("details"))
    details.addEventListener("toggle", redraw);
  let width = 0;
  new ResizeObserver(() => {
    if (width !== document.body.clientWidth) { width = document.body.clientWidth; redraw(); }
  }).observe(document.body);
  redraw();
  if (page.live) { restore(); setInterval(refresh, page.live * 1000); }
})();
