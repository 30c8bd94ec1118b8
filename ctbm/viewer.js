// The live viewer of notebook 00b_viewer: slices come from the kernel as numbers, everything that is seen of them is made here.

const CACHE_BYTES = 96e6; // of slices that are kept
const AHEAD = 8; // slices fetched in the direction of scrolling
const BEHIND = 3;
const AT_ONCE = 3; // questions to the kernel that are not yet answered
const REST_MS = 150; // the kernel hears of changes when the hand has rested so long
const PLAIN = { willReadFrequently: true }; // a canvas in plain memory: every picture is new, so a graphics card would only be fed
const FILL = 0.45; // cover of a filled mask at full opacity

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const copied = (view) => view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength);

function unpacked(view, length) {
  const bytes = new Uint8Array(copied(view));
  const bits = new Uint8Array(length);
  for (let i = 0; i < length; i++) bits[i] = (bytes[i >> 3] >> (i & 7)) & 1;
  return bits;
}

// The edges of a mask between its pixels and the others, in pixels of the image.
function outline(bits, rows, cols) {
  const path = new Path2D();
  const at = (r, c) => (r < 0 || c < 0 || r >= rows || c >= cols ? 0 : bits[r * cols + c]);
  for (let r = 0; r <= rows; r++) {
    for (let c = 0; c <= cols; c++) {
      if (at(r, c) !== at(r - 1, c)) path.moveTo(c, r), path.lineTo(c + 1, r);
      if (at(r, c) !== at(r, c - 1)) path.moveTo(c, r), path.lineTo(c, r + 1);
    }
  }
  return path;
}

function received(meta, buffers, about) {
  if (meta.error) return { ...meta, bytes: 0 };
  const size = meta.rows * meta.cols;
  const values = meta.kind === "int16" ? new Int16Array(copied(buffers[0])) : new Float32Array(copied(buffers[0]));
  const count = about.masks.length;
  const masks = about.masks.map((_, k) => unpacked(buffers[1 + k], size));
  const heat = about.heat.map((_, k) => new Uint8Array(copied(buffers[1 + count + k])));
  const bytes = values.byteLength + (masks.length + heat.length) * size;
  return { ...meta, values, masks, heat, bytes, outlines: [] };
}

// Slices that are here, the questions for those that are not; the longest unused are forgotten.
class Store {
  constructor(model, arrived) {
    this.model = model;
    this.arrived = arrived;
    this.kept = new Map();
    this.bytes = 0;
    this.asked = new Set();
    this.wanted = [];
    for (const { buffers, ...meta } of model.get("first")) this.put(meta, buffers);
    this.hear = (meta, buffers) => {
      this.asked.delete(this.key(meta.series, meta.index));
      this.put(meta, buffers);
      this.ask();
      this.arrived(meta.series, meta.index);
    };
    model.on("msg:custom", this.hear);
  }
  key(series, index) { return `${index}/${series}`; }
  put(meta, buffers) {
    const slice = received(meta, buffers, this.model.get("about").series[meta.series]);
    this.kept.set(this.key(meta.series, meta.index), slice);
    this.bytes += slice.bytes;
    for (const [key, old] of this.kept) {
      if (this.bytes <= CACHE_BYTES || old === slice) break;
      this.kept.delete(key);
      this.bytes -= old.bytes;
    }
  }
  get(series, index) {
    const key = this.key(series, index);
    const slice = this.kept.get(key);
    if (slice) this.kept.delete(key), this.kept.set(key, slice);
    return slice;
  }
  want(list) {
    this.wanted = list;
    this.ask();
  }
  ask() {
    while (this.asked.size < AT_ONCE && this.wanted.length) {
      const [series, index] = this.wanted.shift();
      const key = this.key(series, index);
      if (this.kept.has(key) || this.asked.has(key)) continue;
      this.asked.add(key);
      this.model.send({ series, index });
    }
  }
  close() { this.model.off("msg:custom", this.hear); }
}

// One canvas with what is written on it.
class Pane {
  constructor(owner) {
    this.owner = owner;
    this.canvas = element("canvas");
    this.upper = element("div", { class: "ctbm-upper" });
    this.names = element("div", { class: "ctbm-names" });
    this.lower = element("div", { class: "ctbm-lower" });
    this.bar = element("div", { class: "ctbm-bar" }, "50 mm");
    this.failed = element("div", { class: "ctbm-failed" });
    this.box = element("div", { class: "ctbm-pane" }, this.canvas, this.upper, this.names, this.lower, this.bar, this.failed);
    this.image = document.createElement("canvas");
    this.pointer = null;
    this.series = "";
    this.index = 0;
  }
  get about() { return this.owner.about.series[this.series]; }
  get millimetres() { return this.about.spacing || [1, 1]; }
  // What is shown; the last slice stays until the next one is here.
  paint() {
    const slice = this.owner.store.get(this.series, this.index);
    this.box.classList.toggle("ctbm-waiting", !slice);
    if (slice) this.slice = slice;
    if (!this.slice) return;
    const { words, error } = this.slice;
    this.upper.textContent = words;
    this.failed.textContent = error || "";
    this.canvas.style.visibility = error ? "hidden" : "visible";
    if (!error) this.draw(this.slice);
    this.write();
  }
  draw(slice) {
    const [rowMm, colMm] = this.millimetres;
    this.box.style.aspectRatio = `${slice.cols * colMm} / ${slice.rows * rowMm}`;
    const dense = window.devicePixelRatio || 1;
    const across = Math.max(1, Math.round(this.box.clientWidth * dense));
    const down = Math.max(1, Math.round((across * slice.rows * rowMm) / (slice.cols * colMm)));
    if (this.canvas.width !== across || this.canvas.height !== down) [this.canvas.width, this.canvas.height] = [across, down];
    const context = this.canvas.getContext("2d", PLAIN);
    const { zoom, x, y } = this.owner.sight;
    this.scale = [(zoom * across) / slice.cols, (zoom * down) / slice.rows];
    this.corner = [-x * across * zoom, -y * down * zoom];
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = "black";
    context.fillRect(0, 0, across, down);
    context.setTransform(this.scale[0], 0, 0, this.scale[1], ...this.corner);
    context.imageSmoothingEnabled = this.scale[0] < 3;
    this.place(slice, this.greys(slice), context);
    for (const [k, name] of this.about.heat.entries()) {
      const layer = this.owner.layer(name, "");
      if (layer.on) this.place(slice, this.warmth(slice.heat[k], layer.opacity), context);
    }
    this.outlined(slice, context);
  }
  place(slice, pixels, context) {
    if (this.image.width !== slice.cols || this.image.height !== slice.rows) [this.image.width, this.image.height] = [slice.cols, slice.rows];
    this.image.getContext("2d", PLAIN).putImageData(new ImageData(new Uint8ClampedArray(pixels.buffer), slice.cols, slice.rows), 0, 0);
    context.drawImage(this.image, 0, 0);
  }
  greys(slice) {
    const [level, width] = this.owner.windowOf(this.series);
    const low = level - width / 2;
    const factor = 255 / width;
    const { values } = slice;
    const pixels = new Uint32Array(values.length);
    for (let i = 0; i < values.length; i++) {
      let grey = (values[i] - low) * factor + 0.5;
      grey = grey > 0 ? (grey < 255 ? grey | 0 : 255) : 0;
      pixels[i] = 0xff000000 | (grey << 16) | (grey << 8) | grey;
    }
    return pixels;
  }
  warmth(heat, opacity) {
    const colours = this.owner.about.heat;
    const table = new Uint32Array(256);
    for (let k = 0; k < 256; k++) {
      const [r, g, b, a] = colours.slice(4 * k, 4 * k + 4);
      table[k] = ((Math.round(a * opacity) << 24) | (b << 16) | (g << 8) | r) >>> 0;
    }
    return Uint32Array.from(heat, (share) => table[share]);
  }
  outlined(slice, context) {
    const matrix = context.getTransform();
    const dense = window.devicePixelRatio || 1;
    for (const [k, { name, ink }] of this.about.masks.entries()) {
      const layer = this.owner.layer(name, ink);
      if (!layer.on || !slice.masks[k].includes(1)) continue;
      if (this.owner.filled) {
        const [r, g, b] = [1, 3, 5].map((at) => parseInt(ink.slice(at, at + 2), 16));
        const colour = ((Math.round(255 * FILL * layer.opacity) << 24) | (b << 16) | (g << 8) | r) >>> 0;
        this.place(slice, Uint32Array.from(slice.masks[k], (bit) => (bit ? colour : 0)), context);
      } else {
        slice.outlines[k] ||= outline(slice.masks[k], slice.rows, slice.cols);
        const path = new Path2D();
        path.addPath(slice.outlines[k], matrix);
        context.save();
        context.setTransform(1, 0, 0, 1, 0, 0);
        Object.assign(context, { strokeStyle: ink, lineWidth: 1.2 * dense, lineCap: "square", globalAlpha: layer.opacity });
        context.stroke(path);
        context.restore();
      }
    }
  }
  // The pixel of the image under the pointer.
  under() {
    if (!this.pointer || !this.slice || this.slice.error) return null;
    const box = this.canvas.getBoundingClientRect();
    const x = Math.floor((((this.pointer[0] - box.left) / box.width) * this.canvas.width - this.corner[0]) / this.scale[0]);
    const y = Math.floor((((this.pointer[1] - box.top) / box.height) * this.canvas.height - this.corner[1]) / this.scale[1]);
    if (x < 0 || y < 0 || x >= this.slice.cols || y >= this.slice.rows) return null;
    return { x, y, value: this.slice.values[y * this.slice.cols + x] };
  }
  write() {
    const number = (value) => (Number.isInteger(value) ? value : Number(value.toPrecision(4)));
    const [level, width] = this.owner.windowOf(this.series).map(number);
    const pixel = this.under();
    const said = pixel ? `${number(pixel.value)} ${this.about.unit}  at ${pixel.x}, ${pixel.y}\n` : "";
    this.lower.textContent = `${said}L ${level} W ${width}`;
    this.bar.hidden = !this.about.spacing || !this.slice || !!this.slice.error;
    if (!this.bar.hidden) this.bar.style.width = `${(100 * 50 * this.owner.sight.zoom) / (this.slice.cols * this.millimetres[1])}%`;
    const layers = this.about.masks.filter(({ name, ink }) => this.owner.layer(name, ink).on && this.about.masks.length > 1);
    const spans = layers.map(({ name, ink }) => element("span", { style: `color: ${ink}` }, name));
    const series = this.owner.panes.length > 1 ? [element("b", {}, this.series)] : [];
    this.names.replaceChildren(...series, ...spans);
  }
}

class Viewer {
  constructor(model, el) {
    this.model = model;
    this.about = model.get("about");
    this.names = Object.keys(this.about.series);
    this.start = [model.get("level"), model.get("width")];
    this.own = {};
    for (const [name, { window: own }] of Object.entries(this.about.series)) if (own) this.own[name] = [...own];
    this.sight = { zoom: 1, x: 0, y: 0 };
    this.layers = new Map();
    this.filled = false;
    this.way = 1;
    this.rest = 0;
    this.panes = [];
    this.store = new Store(model, (series, index) => {
      for (const pane of this.panes) if (pane.series === series && pane.index === index) this.repaint();
    });
    this.build(el);
    this.told = () => this.refresh();
    model.on("change:index change:level change:width change:chosen change:beside", this.told);
    this.sizes = new ResizeObserver(() => this.repaint());
    this.sizes.observe(this.stage);
    this.refresh();
  }
  layer(name, ink) {
    if (!this.layers.has(name)) this.layers.set(name, { on: true, opacity: 1, ink });
    return this.layers.get(name);
  }
  windowOf(name) { return this.own[name] || [this.model.get("level"), this.model.get("width")]; }
  get count() { return this.about.series[this.model.get("chosen")].count; }
  get index() { return clamp(this.model.get("index"), 0, this.count - 1); }
  placeIn(name) {
    const [n, m] = [this.count, this.about.series[name].count];
    if (name === this.model.get("chosen")) return this.index;
    return n > 1 ? Math.floor((this.index * (m - 1)) / (n - 1) + 0.5) : Math.floor((m - 1) / 2);
  }
  set(changes) {
    for (const [name, value] of Object.entries(changes)) this.model.set(name, value); // the model tells `refresh`
    clearTimeout(this.saving);
    this.saving = setTimeout(() => this.model.save_changes(), REST_MS);
  }
  go(index) {
    const next = clamp(index, 0, this.count - 1);
    if (next === this.index) return false;
    this.way = Math.sign(next - this.index);
    this.set({ index: next });
    return true;
  }
  setWindow(name, level, width) {
    const least = this.own[name] ? this.about.series[name].window[1] / 1000 : 1;
    const to = [level, Math.max(width, least)];
    if (!this.own[name]) return this.set({ level: to[0], width: to[1] });
    this.own[name] = to;
    this.refresh();
  }
  reset() {
    this.sight = { zoom: 1, x: 0, y: 0 };
    for (const name of Object.keys(this.own)) this.own[name] = [...this.about.series[name].window];
    this.set({ level: this.start[0], width: this.start[1] });
    this.refresh();
  }
  build(el) {
    this.root = element("div", { class: "ctbm-viewer", tabindex: "0", "data-lm-suppress-shortcuts": "true", role: "group", "aria-label": "CT viewer" });
    this.picker = this.select("series", this.names, (name) => this.choose(name));
    this.second = this.select("beside it", ["", ...this.names], (name) => this.set({ beside: name }), (name) => name || "beside: none");
    this.presets = this.select("window", ["", ...this.about.presets.map(([name]) => name)], (name) => this.preset(name), (name) => this.presetText(name));
    this.level = this.number("level", "L", (value) => this.setWindow(this.active, value, this.windowOf(this.active)[1]));
    this.width = this.number("width", "W", (value) => this.setWindow(this.active, this.windowOf(this.active)[0], value));
    this.back = element("button", { type: "button", title: "window and zoom as at the start (0, or double-click)" }, "reset");
    this.back.onclick = () => this.reset();
    const several = this.names.length > 1 ? [this.picker, this.second] : [];
    this.tools = element("div", { class: "ctbm-tools" }, ...several, this.presets, this.level.parentNode, this.width.parentNode, this.back);
    this.stage = element("div", { class: "ctbm-stage" });
    this.slider = element("input", { type: "range", min: "0", step: "1", "aria-label": "slice" });
    this.slider.oninput = () => this.go(Number(this.slider.value));
    this.place = element("output");
    this.over = element("div", { class: "ctbm-tools" });
    const help = "wheel or arrows: slices · drag: window · 1-9: presets · ctrl+wheel: zoom · shift+drag: move · double-click: reset";
    const frame = [this.tools, this.stage, element("div", { class: "ctbm-slide" }, this.slider, this.place), this.over];
    this.root.append(element("style", {}, STYLE), ...frame, element("div", { class: "ctbm-help" }, help));
    el.append(this.root);
    this.root.addEventListener("keydown", (event) => this.key(event));
  }
  select(title, values, chosen, text = (name) => name) {
    const made = element("select", { title, "aria-label": title });
    for (const value of values) made.append(element("option", { value }, text(value)));
    made.onchange = () => {
      chosen(made.value);
      this.root.focus({ preventScroll: true });
    };
    return made;
  }
  number(name, text, changed) {
    const made = element("input", { type: "number", step: "any", "aria-label": name, title: name });
    made.onchange = () => Number.isFinite(made.valueAsNumber) && changed(made.valueAsNumber);
    element("label", {}, text, made);
    return made;
  }
  presetText(name) {
    if (!name) return "window";
    const at = this.about.presets.findIndex(([each]) => each === name);
    const [, level, width] = this.about.presets[at];
    return `${at < 9 ? `${at + 1} ` : ""}${name} (${level}, ${width})`;
  }
  preset(name) {
    const found = this.about.presets.find(([each]) => each === name);
    if (found) this.set({ level: found[1], width: found[2] });
  }
  choose(name) {
    const [n, m] = [this.count, this.about.series[name].count];
    const index = n > 1 ? Math.round((this.index / (n - 1)) * (m - 1)) : Math.floor((m - 1) / 2);
    this.set({ chosen: name, index });
  }
  key(event) {
    if (event.target !== this.root && event.target !== this.slider) return;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
    if (event.key in steps) this.go(this.index + steps[event.key]);
    else if (event.key === "0") this.reset();
    else if (/^[1-9]$/.test(event.key)) this.preset((this.about.presets[event.key - 1] || [])[0]);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
  pane(k) {
    if (this.panes[k]) return this.panes[k];
    const pane = new Pane(this);
    pane.box.addEventListener("wheel", (event) => this.wheel(event, pane), { passive: false });
    pane.box.addEventListener("pointerdown", (event) => this.grab(event, pane));
    pane.box.addEventListener("pointermove", (event) => this.move(event, pane));
    pane.box.addEventListener("pointerup", () => (this.held = null));
    pane.box.addEventListener("pointercancel", () => (this.held = null));
    pane.box.addEventListener("pointerleave", () => (pane.pointer = null, pane.write()));
    pane.box.addEventListener("dblclick", () => this.reset());
    return (this.panes[k] = pane);
  }
  wheel(event, pane) {
    const turn = event.deltaY * (event.deltaMode === 1 ? 33 : event.deltaMode === 2 ? 400 : 1);
    if (event.ctrlKey) return this.zoomed(event, pane, turn);
    this.rest = Math.sign(turn) === Math.sign(this.rest) ? this.rest + turn : turn;
    const steps = Math.abs(turn) >= 50 ? Math.sign(turn) : Math.trunc(this.rest / 30); // a notch is a slice; a touchpad sends crumbs
    if (steps) this.rest = 0;
    const moved = steps ? this.go(this.index + steps) : false;
    if (moved) this.scrolled = event.timeStamp;
    const inside = turn > 0 ? this.index < this.count - 1 : this.index > 0;
    if (moved || inside || event.timeStamp - (this.scrolled || -1e9) < 600) event.preventDefault(); // later, the page scrolls on
  }
  zoomed(event, pane, turn) {
    event.preventDefault();
    const box = pane.canvas.getBoundingClientRect();
    const [u, v] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    const zoom = clamp(this.sight.zoom * Math.exp(-turn / 400), 1, 16);
    this.look(zoom, this.sight.x + u / this.sight.zoom - u / zoom, this.sight.y + v / this.sight.zoom - v / zoom);
  }
  look(zoom, x, y) {
    this.sight = { zoom, x: clamp(x, 0, 1 - 1 / zoom), y: clamp(y, 0, 1 - 1 / zoom) };
    this.repaint();
  }
  grab(event, pane) {
    if (event.button > 1) return;
    this.root.focus({ preventScroll: true });
    pane.box.setPointerCapture(event.pointerId);
    this.active = pane.series;
    const shift = event.shiftKey || event.button === 1;
    this.held = { x: event.clientX, y: event.clientY, window: this.windowOf(pane.series), sight: { ...this.sight }, shift };
    event.preventDefault();
  }
  move(event, pane) {
    pane.pointer = [event.clientX, event.clientY];
    if (!this.held) return pane.write();
    const [right, up] = [event.clientX - this.held.x, this.held.y - event.clientY];
    if (this.held.shift) {
      const { zoom, x, y } = this.held.sight;
      return this.look(zoom, x - right / pane.box.clientWidth / zoom, y + up / pane.box.clientHeight / zoom);
    }
    const [level, width] = this.held.window;
    const pace = this.own[pane.series] ? width / 250 : Math.max(1, Math.round(width / 250)); // whole HU
    if (right || up) this.setWindow(pane.series, level + up * pace, width + right * pace);
  }
  refresh() {
    const names = [this.model.get("chosen"), this.model.get("beside")].filter((name, k) => k === 0 || (name && name in this.about.series));
    this.panes.length = Math.min(this.panes.length, names.length);
    names.forEach((name, k) => Object.assign(this.pane(k), { series: name, index: this.placeIn(name) }));
    const boxes = this.panes.map((pane) => pane.box);
    if (boxes.length !== this.stage.children.length) this.stage.replaceChildren(...boxes);
    if (!names.includes(this.active)) this.active = names[0];
    this.controls(names);
    this.repaint();
    this.fetch(names);
  }
  controls(names) {
    const [level, width] = this.windowOf(this.active);
    const [slider, index] = [this.slider, this.index];
    this.picker.value = names[0];
    this.second.value = names[1] || "";
    slider.max = this.count - 1;
    slider.value = index;
    this.place.textContent = `${index + 1} / ${this.count}`;
    this.level.value = Number(level.toPrecision(6));
    this.width.value = Number(width.toPrecision(6));
    const [l, w] = [this.model.get("level"), this.model.get("width")];
    if (!this.is(this.presets.value, l, w)) this.presets.value = (this.about.presets.find(([name]) => this.is(name, l, w)) || [""])[0];
    const key = JSON.stringify(names);
    if (key !== this.laid) this.lay(names);
    this.laid = key;
  }
  is(name, level, width) { return this.about.presets.some((preset) => preset[0] === name && preset[1] === level && preset[2] === width); }
  // Switches and opacities of what lies over the images.
  lay(names) {
    const found = new Map();
    for (const { masks, heat } of names.map((name) => this.about.series[name])) {
      for (const { name, ink } of masks) found.set(name, ink);
      for (const name of heat) found.set(name, "#dd513a");
    }
    const rows = [...found].map(([name, ink]) => {
      const layer = this.layer(name, ink);
      const [on, opacity] = [element("input", { type: "checkbox" }), element("input", { type: "range", min: 0, max: 1, step: 0.05, "aria-label": `opacity of ${name}` })];
      [on.checked, opacity.value] = [layer.on, layer.opacity];
      on.onchange = () => (layer.on = on.checked, this.repaint());
      opacity.oninput = () => (layer.opacity = Number(opacity.value), this.repaint());
      return element("span", { class: "ctbm-layer" }, element("label", { style: `color: ${ink}` }, on, name), opacity);
    });
    const style = this.select("masks", ["outline", "fill"], (value) => (this.filled = value === "fill", this.repaint()), (value) => `masks: ${value}`);
    style.value = this.filled ? "fill" : "outline";
    const masks = names.some((name) => this.about.series[name].masks.length);
    this.over.replaceChildren(...rows, ...(masks ? [style] : []));
  }
  // What is seen first, then where the hand is going, then where it came from.
  fetch(names) {
    const offsets = [0, ...Array.from({ length: AHEAD }, (_, k) => (k + 1) * this.way), ...Array.from({ length: BEHIND }, (_, k) => -(k + 1) * this.way)];
    const wanted = [];
    for (const offset of offsets) {
      for (const pane of this.panes) {
        const index = pane.index + offset;
        if (index >= 0 && index < this.about.series[pane.series].count) wanted.push([pane.series, index]);
      }
    }
    this.store.want(wanted);
  }
  repaint() {
    this.due ||= requestAnimationFrame(() => {
      this.due = null;
      for (const pane of this.panes) pane.paint();
      this.root.dataset.painted = this.panes.map((pane) => (pane.slice && pane.slice === this.store.get(pane.series, pane.index) ? pane.index : "")).join(" ");
    });
  }
  close() {
    this.store.close();
    this.sizes.disconnect();
    this.model.off("change:index change:level change:width change:chosen change:beside", this.told);
    if (this.due) cancelAnimationFrame(this.due);
  }
}

const STYLE = `
.ctbm-viewer { --line: #3a3f46; box-sizing: border-box; width: fit-content; max-width: 100%; padding: 8px; border-radius: 4px; background: #15181c;
  color: #d6dade; font: 12px/1.4 system-ui, sans-serif; outline: none; border: 1px solid var(--line); }
.ctbm-viewer:focus-visible, .ctbm-viewer:focus-within { border-color: #56b4e9; }
.ctbm-viewer * { box-sizing: border-box; }
.ctbm-tools { display: flex; flex-wrap: wrap; gap: 6px 10px; align-items: center; max-width: 1034px; }
.ctbm-viewer select, .ctbm-viewer input[type=number], .ctbm-viewer button { height: 24px; padding: 0 6px; font: inherit; color: inherit;
  background: #22262c; border: 1px solid var(--line); border-radius: 3px; max-width: 190px; }
.ctbm-viewer button { cursor: pointer; }
.ctbm-viewer input[type=number] { width: 72px; margin-left: 4px; }
.ctbm-viewer input[type=range] { accent-color: #56b4e9; cursor: pointer; }
.ctbm-viewer label { display: inline-flex; align-items: center; gap: 3px; white-space: nowrap; }
.ctbm-layer { display: inline-flex; align-items: center; gap: 6px; }
.ctbm-layer input[type=range] { width: 80px; }
.ctbm-stage { display: flex; gap: 8px; margin: 6px 0; }
.ctbm-pane { position: relative; flex: 0 1 512px; width: 512px; min-width: 0; align-self: flex-start; background: black; overflow: hidden;
  cursor: crosshair; touch-action: none; user-select: none; color: white; font-size: 11px; text-shadow: 0 0 2px black, 0 0 2px black; }
.ctbm-pane canvas { display: block; width: 100%; height: 100%; }
.ctbm-upper, .ctbm-names, .ctbm-lower, .ctbm-bar { position: absolute; pointer-events: none; white-space: pre-line; }
.ctbm-upper { left: 7px; top: 5px; max-width: 65%; }
.ctbm-names { right: 7px; top: 5px; display: flex; flex-direction: column; align-items: flex-end; max-width: 35%; }
.ctbm-lower { left: 7px; bottom: 5px; font-variant-numeric: tabular-nums; white-space: pre-wrap; }
.ctbm-bar { right: 10px; bottom: 8px; border-bottom: 2px solid white; text-align: right; min-width: 0; }
.ctbm-bar[hidden] { display: none; }
.ctbm-failed { position: absolute; inset: 30% 10% auto; text-align: center; color: #ffb000; white-space: pre-wrap; overflow-wrap: anywhere; }
.ctbm-waiting::after { content: "loading"; position: absolute; inset: auto 0 40% 0; text-align: center; color: #ffb000; animation: ctbm-late 0s 0.4s both; }
@keyframes ctbm-late { from { visibility: hidden; } to { visibility: visible; } }
.ctbm-slide { display: flex; gap: 8px; align-items: center; margin-bottom: 4px; }
.ctbm-slide input { flex: 1; min-width: 0; }
.ctbm-slide output { font-variant-numeric: tabular-nums; }
.ctbm-help { margin-top: 4px; color: #8d959e; font-size: 11px; max-width: 512px; }
`;

export default {
  render({ model, el }) {
    const viewer = new Viewer(model, el);
    return () => viewer.close();
  },
};
