"use strict";

// The page's script: draws charts in the page's colours, lists their values as tables, and animates denoising.
// Text by a model is inserted as text, never as markup.
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const specs = read("specs");
  const dark = matchMedia("(prefers-color-scheme: dark)");

  function theme() {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const axis = {
      labelColor: color("--soft"), titleColor: color("--soft"), gridColor: color("--line"),
      domainColor: color("--line"), tickColor: color("--line"), labelFontSize: 12, titleFontSize: 12,
      titleFontWeight: "normal",
    };
    return {
      background: "transparent",
      font: "system-ui, sans-serif",
      view: { stroke: null },
      axis,
      legend: { labelColor: color("--ink"), titleColor: color("--soft"), labelFontSize: 12,
        symbolBaseStrokeColor: color("--ink"),
        layout: { bottom: { direction: "vertical", anchor: "start", offset: 8 } } },
      rule: { color: color("--ink") },
      range: { category: color("--series").split(",").map((part) => part.trim()) },
    };
  }

  // Around the nearest point, Vega-Lite reads numbers from the point but names from its Voronoi cell, which has none.
  function nameNearest(vega) {
    for (const mark of vega.marks) {
      const update = mark.name?.endsWith("voronoi") && mark.encode?.update;
      if (update?.tooltip) update.tooltip.signal = update.tooltip.signal.replace(/(?<!datum\.)\bdatum\[/g, "datum.datum[");
    }
    return vega;
  }

  async function draw() {
    const config = theme();
    for (const [id, spec] of Object.entries(specs)) {
      const shape = { width: "container", height: spec.height || 210, autosize: { type: "fit-x", contains: "padding" } };
      const full = { $schema: "https://vega.github.io/schema/vega-lite/v6.json", ...spec, ...shape };
      await vegaEmbed(`#${id}`, full, { config, patch: nameNearest, renderer: "svg", actions: false, ast: true });
    }
    document.documentElement.dataset.drawn = Object.keys(specs).length;
  }

  function table(id) {
    const rows = specs[id].data.values;
    const names = [...new Set(rows.flatMap(Object.keys))].filter((name) => name !== "order");
    const labels = { x: "step", y: "value" };
    const shown = document.createElement("table");
    const head = shown.createTHead().insertRow();
    for (const name of names) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = labels[name] || name;
      head.append(cell);
    }
    const body = shown.createTBody();
    for (const row of rows) {
      const line = body.insertRow();
      for (const name of names) {
        const value = row[name];
        line.insertCell().textContent = typeof value === "number" ? String(Number(value.toPrecision(5))) : value ?? "";
      }
    }
    const frame = document.createElement("div");
    frame.className = "wide";
    frame.tabIndex = 0;
    frame.append(shown);
    return frame;
  }

  for (const details of document.querySelectorAll("details[data-of]")) {
    details.addEventListener("toggle", () => {
      if (details.open && !details.querySelector("table")) details.append(table(details.dataset.of));
    });
  }

  function play(element, animations) {
    const [select, button, slider] = ["select", "button", "input"].map((name) => element.querySelector(name));
    const [prompt, tokens] = [".prompt", ".tokens"].map((name) => element.querySelector(name));
    const output = element.querySelector("output");
    let animation, timer;

    function show() {
      const call = Number(slider.value), last = Number(slider.max);
      const fresh = [];
      [...tokens.children].forEach((token, i) => {
        const isDecided = animation.committed_at[i] < call, isNew = animation.committed_at[i] === call - 1;
        token.className = `token${isDecided ? "" : " masked"}${isNew ? " new" : ""}`;
        token.textContent = isDecided ? animation.pieces[i] : "·";
        token.title = isDecided ? `call ${animation.committed_at[i] + 1}, confidence ${animation.confidence[i].toFixed(3)}` : "not decided";
        if (isNew) fresh.push(`${JSON.stringify(animation.pieces[i])} (${animation.confidence[i].toFixed(3)})`);
      });
      const what = fresh.length ? `committed ${fresh.join(", ")}` : call ? "committed nothing" : "nothing is decided";
      const reward = typeof animation.reward === "number" ? ` Reward ${animation.reward.toFixed(3)}.` : "";
      output.textContent = `Call ${call} of ${last}: ${what}.${call === last ? reward : ""}`;
      slider.setAttribute("aria-valuetext", `call ${call} of ${last}`);
    }

    function stop() {
      clearInterval(timer);
      timer = undefined;
      button.textContent = "Play";
    }

    function load() {
      stop();
      animation = animations[Number(select.value)];
      const calls = Math.max(...animation.committed_at) + 1;
      slider.max = calls;
      slider.value = calls;
      prompt.textContent = animation.prompt;
      tokens.replaceChildren(...animation.pieces.map((_, i) => {
        const token = document.createElement("span");
        token.style.setProperty("--when", calls > 1 ? animation.committed_at[i] / (calls - 1) : 0);
        token.style.setProperty("--sure", animation.confidence[i]);
        return token;
      }));
      show();
    }

    button.addEventListener("click", () => {
      if (timer !== undefined) return stop();
      if (Number(slider.value) >= Number(slider.max)) slider.value = 0;
      button.textContent = "Pause";
      show();
      timer = setInterval(() => {
        slider.value = Number(slider.value) + 1;
        show();
        if (Number(slider.value) >= Number(slider.max)) stop();
      }, Math.max(30, Math.min(350, 8000 / Number(slider.max))));
    });
    select.addEventListener("change", load);
    slider.addEventListener("input", () => { stop(); show(); });
    load();
  }

  const animations = read("animations");
  for (const element of document.querySelectorAll(".animation")) play(element, animations[element.dataset.run]);

  const button = document.getElementById("theme");
  const isDark = () => (document.documentElement.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.hidden = false;
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    label();
    draw();
  });
  dark.addEventListener("change", () => { label(); draw(); });
  label();
  draw();
})();
