// The viewer of traces (observe/trace.py): step through an answer and watch where every token looked and which experts it went through.
// <div class="viewer" data-traces="ID of a JSON script" [data-page]></div>. The fragment #trace=1&token=3&tap=0&head=2 opens it there.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const RAMP = [[0, 60, 20, 110, 0], [0.25, 125, 30, 130, 0.5], [0.5, 205, 60, 80, 0.68], [0.75, 250, 140, 30, 0.78], [1, 252, 250, 160, 0.9]];
  const percent = (x) => (100 * x).toFixed(x < 0.0995 ? 1 : 0) + " %";
  const visible = (text) => text.replace(/\n/g, "⏎").replace(/▁| /g, "␣").replace(/Ġ/g, "␣") || "∅";

  function el(name, attributes, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
    }
    made.append(...children.filter((child) => child !== null));
    return made;
  }

  function heat(x) {
    let at = 1;
    while (at < RAMP.length - 1 && x > RAMP[at][0]) at += 1;
    const [low, high] = [RAMP[at - 1], RAMP[at]];
    const share = Math.min(1, Math.max(0, (x - low[0]) / (high[0] - low[0])));
    const [r, g, b, a] = [1, 2, 3, 4].map((part) => low[part] + share * (high[part] - low[part]));
    return `rgba(${r | 0},${g | 0},${b | 0},${a.toFixed(3)})`;
  }

  const hue = (expert) => (expert * 137.508) % 360;

  class Tap {  // One tap's maps, as weights.
    constructor(found, cells) {
      Object.assign(this, found);
      this.cells = cells;
      this.bytes = Uint8Array.from(atob(found.maps), (letter) => letter.charCodeAt(0));
      this.views = found.peaks.length ? found.peaks[0].length : 0;
    }
    map(token, view) {
      const start = (token * this.views + view) * this.cells;
      return Array.from(this.bytes.subarray(start, start + this.cells), (byte) => (byte / 255) * this.peaks[token][view]);
    }
    top(view) {
      return Math.max(1e-9, ...this.peaks.map((peaks) => peaks[view]));
    }
  }

  class Viewer {
    constructor(root) {
      this.root = root;
      this.traces = JSON.parse(document.getElementById(root.dataset.traces).textContent);
      this.state = { trace: 0, token: 0, tap: 0, head: 0 };
      this.gaze = true;
      this.coloured = "cluster";
      (root.hasAttribute("data-page") ? document : root).addEventListener("keydown", (event) => this.key(event));
      window.addEventListener("hashchange", () => this.fromFragment(true));
      window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.drawRoutes());
      new ResizeObserver(() => this.drawRoutes()).observe(root);
      if (!this.fromFragment(false)) this.open(0);
    }

    fromFragment(scroll) {
      const asked = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
      if (!["trace", "token", "tap", "head"].some((name) => name in asked)) return false;
      this.open(Number(asked.trace ?? this.state.trace) || 0);
      this.go({ token: Number(asked.token || 0), tap: Number(asked.tap || 0), head: Number(asked.head || 0) });
      if (scroll) { this.root.scrollIntoView({ block: "start" }); this.root.focus({ preventScroll: true }); }
      return true;
    }

    key(event) {
      if (event.ctrlKey || event.metaKey || event.altKey || ["SELECT", "TEXTAREA"].includes(event.target.tagName)) return;
      if (event.target.type === "range" && event.key.startsWith("Arrow")) return;
      const { token, tap, head } = this.state;
      const moves = {
        ArrowRight: { token: token + 1 }, ArrowLeft: { token: token - 1 }, Home: { token: 0 }, End: { token: Infinity },
        ArrowDown: { head: head + 1 }, ArrowUp: { head: head - 1 }, t: { tap: this.taps.length ? (tap + 1) % this.taps.length : 0 },
      };
      if (event.key === "g") { this.gaze = !this.gaze; this.show(); }
      else if (event.key in moves) this.go(moves[event.key]);
      else return;
      event.preventDefault();
    }

    go(change) {
      Object.assign(this.state, change);
      const within = (name, count) => { this.state[name] = Math.max(0, Math.min(count - 1, this.state[name] || 0)); };
      within("token", this.trace.tokens.length);
      within("tap", this.taps.length);
      within("head", this.taps.length ? this.taps[this.state.tap].views : 1);
      this.show();
    }

    open(index) {
      index = Math.max(0, Math.min(this.traces.length - 1, index));
      this.state = { trace: index, token: 0, tap: this.state.tap, head: this.state.head };
      const trace = (this.trace = this.traces[index]);
      const cells = trace.pictures.reduce((sum, picture) => sum + picture.rows * picture.columns, 0);
      this.taps = trace.taps.map((tap) => new Tap(tap, cells));
      this.own = new Set((trace.clusters[trace.skill] || []).map(([layer, expert]) => `${layer}:${expert}`));
      this.cells = [];
      this.root.replaceChildren(this.head(), this.tokens(), el("div", { class: "v-body" }, this.sight(), this.card()), this.routes());
      this.go({});
    }

    head() {
      const { traces, trace } = this;
      const verdict = trace.correct === null ? "" : trace.correct ? "✓ " : "✗ ";
      const choose = traces.length < 2 ? null : el("label", { class: "v-choose" }, "answer ", el("select", { onchange: (event) => this.open(Number(event.target.value)) },
        ...traces.map((one, at) => el("option", { value: at, selected: at === this.state.trace },
          `${one.when ? one.when + ", " : ""}${one.skill === "none" ? "" : one.skill + ": "}${one.question.slice(0, 60)} ${one.correct === null ? "" : one.correct ? "✓" : "✗"}`))));
      return el("div", { class: "v-head" }, choose, el("p", { class: "v-question" }, trace.question),
        el("p", { class: trace.correct === null ? "v-answer" : trace.correct ? "v-answer up" : "v-answer down" }, verdict + trace.text,
          trace.correct === false && trace.gold ? el("span", { class: "v-soft" }, `  right: ${trace.gold}`) : null));
    }

    tokens() {
      const tokens = this.trace.tokens;
      this.chips = tokens.map((token, at) => el("button", { type: "button", class: "v-token", title: `token ${at + 1}: probability ${percent(Math.exp(token.logprob))}`,
        style: `--sure:${Math.exp(token.logprob).toFixed(3)}`, onclick: () => this.go({ token: at }) }, visible(token.text)));
      this.slider = el("input", { type: "range", min: 0, max: Math.max(0, tokens.length - 1), value: 0, "aria-label": "token of the answer",
        oninput: (event) => this.go({ token: Number(event.target.value) }) });
      const cut = this.trace.cut ? el("span", { class: "v-soft" }, ` and ${this.trace.cut} more that are not traced`) : null;
      return el("div", { class: "v-steps" }, el("div", { class: "v-tokens" }, ...this.chips, cut), this.slider,
        el("p", { class: "v-soft v-keys" }, "← → tokens, ↑ ↓ heads, t taps, g picture alone. The bar under a token is its probability."));
    }

    sight() {
      const pictures = this.trace.pictures;
      if (!pictures.length) return el("div", { class: "v-sight" }, el("p", { class: "v-soft" }, "A question without a picture."));
      this.frames = pictures.map((picture) => this.frame(picture));
      const taps = this.taps.map((tap, at) => el("button", { type: "button", class: "v-tap", onclick: () => this.go({ tap: at }) }, `tap ${at}: layer ${tap.source} → ${tap.target}`));
      const views = this.taps.length ? this.taps[0].views : 0;
      const heads = Array.from({ length: views }, (_, at) => el("button", { type: "button", class: "v-view", onclick: () => this.go({ head: at }) }, at ? `${at - 1}` : "mean"));
      this.tapButtons = taps;
      this.headButtons = heads;
      this.readout = el("p", { class: "v-readout", "aria-live": "polite" });
      this.scale = el("span", { class: "v-soft" });
      const legend = this.taps.length ? el("div", { class: "v-legend" }, el("span", { class: "v-soft" }, "0"), el("i", {}), this.scale) : null;
      return el("div", { class: "v-sight" }, el("div", { class: "v-pictures" }, ...this.frames), legend,
        this.taps.length ? el("div", { class: "v-controls" }, el("span", { class: "v-soft" }, "tap "), ...taps) : null,
        this.taps.length ? el("div", { class: "v-controls" }, el("span", { class: "v-soft" }, "head "), ...heads) : null,
        this.taps.length ? this.readout : el("p", { class: "v-soft" }, "The model has no CLVR taps."));
    }

    frame(picture) {
      const svg = document.createElementNS(SVG, "svg");
      svg.setAttribute("viewBox", `0 0 ${picture.columns} ${picture.rows}`);
      svg.setAttribute("preserveAspectRatio", "none");
      for (let row = 0; row < picture.rows; row += 1) {
        for (let column = 0; column < picture.columns; column += 1) {
          const cell = document.createElementNS(SVG, "rect");
          for (const [name, value] of Object.entries({ x: column, y: row, width: 1.01, height: 1.01 })) cell.setAttribute(name, value);
          svg.append(cell);
          this.cells.push({ cell, row, column });
        }
      }
      if (this.trace.pictures.length === 1) {
        for (const [top, left, bottom, right] of this.trace.boxes) {
          const box = document.createElementNS(SVG, "rect");
          const place = { x: left * picture.columns, y: top * picture.rows, width: (right - left) * picture.columns, height: (bottom - top) * picture.rows };
          for (const [name, value] of Object.entries(place)) box.setAttribute(name, value);
          box.setAttribute("class", "v-box");
          svg.append(box);
        }
      }
      const image = (type) => el("img", { class: type, src: picture.src, alt: type === "v-plain" ? "the picture" : "the picture under the gaze" });
      return el("figure", { class: "v-frame" }, el("div", { class: "v-stack" }, image("v-under"), svg), image("v-plain"));
    }

    card() {
      this.tokenCard = el("div", { class: "v-card" });
      return this.tokenCard;
    }

    routes() {
      if (!this.trace.layers.length) return el("div", {});
      this.canvas = el("canvas", { class: "v-map", role: "img", "aria-label": "routes of the answer: tokens across, layers down", onclick: (event) => this.pick(event) });
      const modes = this.own.size ? ["cluster", "expert"] : ["expert"];
      if (!modes.includes(this.coloured)) this.coloured = modes[0];
      const words = { cluster: `gates on the cluster of ${this.trace.skill}`, expert: "the first expert" };
      this.modeButtons = modes.map((mode) => el("button", { type: "button", class: "v-mode", "data-mode": mode, onclick: () => { this.coloured = mode; this.show(); } }, words[mode]));
      return el("div", { class: "v-routes" }, el("div", { class: "v-controls" }, el("b", {}, "Routes of the answer"), el("span", { class: "v-soft" }, " tokens across, layers down, coloured by "), ...this.modeButtons),
        el("div", { class: "v-scroll" }, this.canvas));
    }

    pick(event) {
      const box = this.canvas.getBoundingClientRect();
      this.go({ token: Math.floor((event.clientX - box.left - this.left) / this.width) });
    }

    show() {
      const { token } = this.state;
      this.root.dataset.token = token;
      this.chips.forEach((chip, at) => chip.setAttribute("aria-pressed", at === token));
      this.slider.value = token;
      this.showGaze();
      this.showCard();
      this.drawRoutes();
    }

    showGaze() {
      const tap = this.taps[this.state.tap];
      if (!tap || !this.trace.pictures.length) return;
      const { token, head } = this.state;
      const map = tap.map(token, head);
      const top = tap.top(head);
      this.root.classList.toggle("v-alone", !this.gaze);
      this.cells.forEach(({ cell, row, column }, at) => {
        cell.style.fill = heat(map[at] / top);
        cell.dataset.weight = map[at].toFixed(4);
      });
      this.tapButtons.forEach((button, at) => button.setAttribute("aria-pressed", at === this.state.tap));
      this.headButtons.forEach((button, at) => button.setAttribute("aria-pressed", at === head));
      this.scale.textContent = `${percent(top)} of a token's gaze on one cell`;
      const best = map.indexOf(Math.max(...map));
      const place = map[best] > 0 ? `most in row ${this.cells[best].row + 1}, column ${this.cells[best].column + 1}: ${percent(map[best])} (evenly spread: ${percent(1 / map.length)})` : "nothing to look at";
      const within = tap.inside ? `, ${percent(tap.inside[token])} on what the answer rests on (dashed; their area: ${percent(tap.chance)})` : "";
      const view = head ? `head ${head - 1}` : "mean over heads";
      this.readout.textContent = `“${visible(this.trace.tokens[token].text)}”, tap ${this.state.tap}, ${view}: ${place}. Mean over heads: entropy ${tap.entropy[token].toFixed(2)} of 1${within}.`;
    }

    showCard() {
      const token = this.trace.tokens[this.state.token];
      if (!token) { this.tokenCard.replaceChildren(el("p", { class: "v-soft" }, "An empty answer.")); return; }
      const bars = token.alternatives.map(([text, logprob]) => el("div", { class: text === token.text ? "v-bar v-chosen" : "v-bar" }, el("span", { class: "v-name" }, visible(text)),
        el("i", { style: `--share:${Math.exp(logprob)}` }), el("span", { class: "v-number" }, percent(Math.exp(logprob)))));
      const layers = this.trace.layers.map((number, at) => el("div", { class: "v-layer" }, el("span", { class: "v-name" }, `layer ${number}`), el("div", { class: "v-gates" },
        ...token.experts[at].map((expert, place) => {
          const mine = this.own.has(`${at}:${expert}`);
          return el("i", { class: mine ? "v-gate v-mine" : "v-gate", style: `flex-grow:${token.gates[at][place]};--hue:${hue(expert)}`,
            title: `layer ${number}, expert ${expert}: gate ${token.gates[at][place]}${mine ? ", in the cluster of " + this.trace.skill : ""}` }, token.gates[at][place] < 0.07 ? "" : `${expert}`);
        }))));
      this.tokenCard.replaceChildren(
        el("p", { class: "v-title" }, el("b", {}, `token ${this.state.token + 1} of ${this.trace.tokens.length}: `), el("code", {}, visible(token.text)),
          el("span", { class: "v-soft" }, `  log-probability ${token.logprob.toFixed(3)}`)),
        el("div", { class: "v-alternatives" }, ...bars),
        ...(layers.length ? [el("p", { class: "v-title" }, el("b", {}, "experts"), el("span", { class: "v-soft" }, this.own.size ? ` as wide as their gates; framed: in the cluster of ${this.trace.skill}` : " as wide as their gates")),
          el("div", { class: "v-layers" }, ...layers)] : []),
      );
    }

    drawRoutes() {
      if (!this.trace || !this.trace.layers.length || !this.canvas) return;
      const { tokens, layers } = this.trace;
      const byCluster = this.coloured === "cluster";
      const shown = [...layers.keys()].filter((at) => !byCluster || [...this.own].some((pair) => pair.startsWith(`${at}:`)));  // a cluster's layers alone
      const style = getComputedStyle(this.root);
      const [ink, soft, line, strong] = ["--ink", "--soft", "--line", "--blue"].map((name) => style.getPropertyValue(name).trim());
      this.left = 56;
      const room = Math.max(240, this.root.clientWidth - this.left - 24);
      this.width = Math.max(7, Math.min(64, Math.floor(room / Math.max(1, tokens.length))));
      const tall = Math.max(7, Math.min(22, Math.floor(360 / shown.length)));
      const [across, down] = [this.left + this.width * tokens.length + 2, tall * shown.length + 24];
      const ratio = window.devicePixelRatio || 1;
      Object.assign(this.canvas, { width: across * ratio, height: down * ratio });
      Object.assign(this.canvas.style, { width: `${across}px`, height: `${down}px` });
      const draw = this.canvas.getContext("2d");
      draw.scale(ratio, ratio);
      draw.font = "11px system-ui, sans-serif";
      draw.textBaseline = "middle";
      shown.forEach((at, row) => {
        if (row % Math.ceil(14 / tall) === 0) { draw.fillStyle = soft; draw.fillText(`layer ${layers[at]}`, 0, row * tall + tall / 2); }
        tokens.forEach((token, place) => {
          const [x, y, w, h] = [this.left + place * this.width, row * tall, this.width - 1, tall - 1];
          const share = token.experts[at].reduce((sum, expert, k) => sum + (this.own.has(`${at}:${expert}`) ? token.gates[at][k] : 0), 0);
          draw.fillStyle = line; draw.fillRect(x, y, w, h);
          draw.globalAlpha = byCluster ? share : 0.35 + 0.65 * token.gates[at][0];
          draw.fillStyle = byCluster ? strong : `hsl(${hue(token.experts[at][0])} 60% 55%)`;
          draw.fillRect(x, y, w, h);
          draw.globalAlpha = 1;
          if (!byCluster && this.width >= 18 && tall >= 12) { draw.fillStyle = "#10151b"; draw.textAlign = "center"; draw.fillText(`${token.experts[at][0]}`, x + w / 2, y + h / 2 + 0.5); draw.textAlign = "start"; }
        });
      });
      draw.fillStyle = soft;
      draw.textAlign = "center";
      if (this.width >= 24) tokens.forEach((token, place) => draw.fillText(visible(token.text).slice(0, Math.floor(this.width / 7)), this.left + (place + 0.5) * this.width, down - 10));
      draw.textAlign = "start";
      draw.strokeStyle = ink;
      draw.lineWidth = 2;
      draw.strokeRect(this.left + this.state.token * this.width - 1, 1, this.width + 1, tall * shown.length - 1);
      (this.modeButtons || []).forEach((button) => button.setAttribute("aria-pressed", button.dataset.mode === this.coloured));
    }
  }

  for (const root of document.querySelectorAll(".viewer")) new Viewer(root);
})();
