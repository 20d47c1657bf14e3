// The page's script, after denoising.js: draws charts in the page's colours, lists their values as tables, plays denoising.
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

  // Plays a prompt's completions beside each other, call by call.
  function play(element, animations) {
    const select = element.querySelector(".which");
    const [prompt, panes] = [".prompt", ".panes"].map((name) => element.querySelector(name));
    let shown = [];
    const controls = denoising.control(element, (call) => shown.forEach((show) => show(call)));

    function load() {
      const animation = animations[Number(select.value)];
      prompt.textContent = animation.prompt;
      panes.replaceChildren();
      shown = animation.panes.map((pane) => makePane(panes, pane, animation.block_length));
      const calls = Math.max(...animation.panes.map(countCalls));
      controls.load(calls, calls);
    }

    select.addEventListener("change", load);
    load();
  }

  const countCalls = (pane) => Math.max(...pane.committed_at) + 1;

  // Adds a completion to the panes; returns what shows it after so many calls.
  function makePane(panes, pane, blockLength) {
    const [frame, head, board, output] = ["div", "h4", "p", "output"].map((name) => document.createElement(name));
    const verdict = { true: ", solved", false: ", not solved" }[pane.is_solved] ?? "";
    const reward = typeof pane.reward === "number" ? `, reward ${pane.reward.toFixed(3)}` : "";
    head.textContent = `${pane.when}${verdict}${reward}`;
    head.className = pane.is_solved === true ? "solved" : "";
    frame.append(head, board, output);
    panes.append(frame);
    const calls = countCalls(pane);
    return (number) => {
      const call = Math.min(number, calls), since = pane.committed_at;
      const pieces = pane.pieces.map((piece, i) => (since[i] < call ? piece : null));
      denoising.draw(board, { ...pane, pieces, since, call, calls, blockLength });
      const fresh = pieces.flatMap((piece, i) =>
        piece !== null && since[i] === call - 1 ? [`${JSON.stringify(piece)} (${pane.confidence[i].toFixed(3)})`] : []);
      const what = fresh.length ? `decided, with confidence, ${fresh.join(", ")}` : call ? "decided nothing" : "nothing is decided";
      output.textContent = `Call ${call} of ${calls}: ${what}.`;
    };
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
