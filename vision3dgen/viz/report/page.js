"use strict";
// The page's own script. Everything shown is written with textContent or set as an attribute: no name becomes markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const shown = (value) => (value === null || value === undefined ? "-" : Number(value).toPrecision(4));
  const plain = { displaylogo: false, responsive: true, displayModeBar: false };
  const typeface = { family: "system-ui, Arial, sans-serif", size: 12, color: "#1f2328" };

  // ---------------------------------------------------------------- tables: a click on a head sorts by its column

  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value !== undefined ? Number(cell.dataset.value) : cell.textContent.trim();
  };
  const order = (a, b) => {
    const missing = (x) => x === "" || x === "-" || Number.isNaN(x);
    if (missing(a) || missing(b)) return missing(a) - missing(b); // what is missing goes last, up or down
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  };
  const sort = (table, column, sign) => {
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [row, value(row, column)]);
    const missing = (x) => x === "" || x === "-" || Number.isNaN(x);
    rows.sort(([, a], [, b]) => (missing(a) || missing(b) ? order(a, b) : sign * order(a, b)));
    body.append(...rows.map(([row]) => row));
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const ascending = head.getAttribute("aria-sort") !== "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
        sort(table, column, ascending ? 1 : -1);
      });
    });
  }

  // ---------------------------------------------------------------- curves

  for (const chart of data.curves) {
    const lines = chart.lines.map((line) => ({
      x: line.steps, y: line.values, name: line.name, mode: line.values.length < 30 ? "lines+markers" : "lines",
      line: { color: line.color, width: 1.6, dash: line.dash }, marker: { size: 4 }, hovertemplate: "%{x}: %{y:.4g}",
    }));
    Plotly.newPlot(chart.place, lines, {
      title: { text: chart.title, font: { ...typeface, size: 13 }, x: 0.02, xanchor: "left" },
      margin: { l: 48, r: 10, t: 30, b: 34 }, font: typeface, showlegend: lines.length > 1,
      legend: { orientation: "h", y: -0.2, font: { size: 11 } },
      xaxis: { title: { text: "step", standoff: 4, font: { size: 11 } }, gridcolor: "#eceff2", zeroline: false },
      yaxis: { type: chart.log ? "log" : "linear", gridcolor: "#eceff2", zeroline: false, exponentformat: "power" },
    }, plain);
  }

  // ---------------------------------------------------------------- worst and best items

  const cases = byId("cases");
  if (cases) {
    const [run, metric] = [byId("case-run"), byId("case-metric")];
    const fill = () => {
      const scored = data.cases[run.value];
      const kept = metric.value;
      metric.replaceChildren(...scored.metrics.map((own, index) => new Option(own.name, index)));
      const again = scored.metrics.findIndex((own) => own.name === cases.dataset.metric);
      metric.value = again >= 0 ? again : kept && kept < scored.metrics.length ? kept : scored.principal;
      list();
    };
    const list = () => {
      const own = data.cases[run.value].metrics[metric.value];
      for (const [side, entries, label] of [["worst", own.worst, own.labels[0]], ["best", own.best, own.labels[1]]]) {
        byId(`${side}-title`).textContent = `${label}: ${own.name}`;
        byId(side).tBodies[0].replaceChildren(...entries.map((entry) => {
          const row = document.createElement("tr");
          const [item, number] = [row.insertCell(), row.insertCell()];
          const drawn = data.samples.findIndex((sample) => sample.id === entry.id);
          if (drawn >= 0) {
            const link = document.createElement("a");
            link.href = "#shapes";
            link.textContent = entry.title;
            link.addEventListener("click", () => choose(drawn, data.cases[run.value].run));
            item.append(link);
          } else item.textContent = entry.title;
          number.className = "number";
          number.textContent = shown(entry.value);
          return row;
        }));
      }
    };
    run.addEventListener("change", fill);
    metric.addEventListener("change", () => { cases.dataset.metric = metric.selectedOptions[0].textContent; list(); });
    fill();
  }

  // ---------------------------------------------------------------- shapes to turn

  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const decoded = new Map();
  const decode = (shape) => {
    if (decoded.has(shape)) return decoded.get(shape);
    const raw = new Uint16Array(bytes(shape.points).buffer);
    const count = raw.length / 3;
    const axes = [0, 1, 2].map((axis) => Float32Array.from({ length: count }, (_, i) => shape.low[axis] + shape.step[axis] * raw[3 * i + axis]));
    const result = { axes, count };
    if (shape.faces) {
      const buffer = bytes(shape.faces).buffer;
      const faces = shape.wide ? new Uint32Array(buffer) : new Uint16Array(buffer);
      result.faces = [0, 1, 2].map((corner) => Uint32Array.from({ length: faces.length / 3 }, (_, i) => faces[3 * i + corner]));
    }
    if (shape.error) result.error = new Float32Array(bytes(shape.error).buffer);
    if (shape.colors) {
      const colors = bytes(shape.colors);
      result.colors = Array.from({ length: count }, (_, i) => `rgb(${colors[3 * i]},${colors[3 * i + 1]},${colors[3 * i + 2]})`);
    }
    decoded.set(shape, result);
    return result;
  };
  const traces = (shape, color, byError, largest) => {
    if (!shape) return [];
    const { axes: [x, y, z], faces, error, colors } = decode(shape);
    const bar = { title: { text: "distance to the truth", side: "right", font: { size: 11 } }, thickness: 10, len: 0.8, x: 1 };
    const scale = { colorscale: "Cividis", cmin: 0, cmax: largest };
    if (faces) {
      const [i, j, k] = faces;
      const paint = byError && error ? { intensity: error, ...scale, showscale: true, colorbar: bar } : { color };
      return [{ type: "mesh3d", x, y, z, i, j, k, ...paint, flatshading: true, hoverinfo: "skip",
        lighting: { ambient: byError ? 0.75 : 0.45, diffuse: byError ? 0.4 : 0.75, specular: 0.08, roughness: 0.8 }, lightposition: { x: -400, y: 700, z: -600 } }];
    }
    const paint = byError && error ? { color: error, ...scale, showscale: true, colorbar: bar } : { color: colors || color };
    return [{ type: "scatter3d", mode: "markers", x, y, z, marker: { size: 2, ...paint }, hoverinfo: "skip" }];
  };
  const viewer = byId("viewer");
  let choose = () => {};
  if (viewer && data.samples.length) {
    const [sampleMenu, headMenu, colorMenu] = [byId("sample"), byId("head"), byId("color")];
    const [left, right] = [byId("left"), byId("right")];
    let camera = null;
    const layout = () => ({
      margin: { l: 0, r: 0, t: 0, b: 0 }, font: typeface, showlegend: false,
      scene: { aspectmode: "data", dragmode: "orbit", camera,
        ...Object.fromEntries(["xaxis", "yaxis", "zaxis"].map((axis) => [axis, { visible: false, showspikes: false }])) },
    });
    const draw = async () => {
      const sample = data.samples[sampleMenu.value];
      const name = headMenu.value;
      const shape = sample.shapes[name];
      const fresh = () => ({ up: sample.up, eye: sample.eye, center: { x: 0, y: 0, z: 0 }, projection: { type: "perspective" } });
      camera = camera && viewer.dataset.up === JSON.stringify(sample.up) ? camera : fresh();
      viewer.dataset.up = JSON.stringify(sample.up);
      const of = (own) => (own ? ` (${own.of.toLocaleString("en")} ${own.faces ? "faces" : "points"}${own.faces && own.of > data.limits.faces || !own.faces && own.of > data.limits.points ? ", drawn with fewer" : ""})` : ": empty");
      byId("left-title").textContent = name + of(shape);
      byId("right-title").textContent = sample.truth ? `truth${of(sample.truth)}` : "no truth";
      await Plotly.react(left, traces(shape, data.colors[name] || "#2976b8", colorMenu.value === "error", sample.largest), layout(), plain);
      await Plotly.react(right, traces(sample.truth, "#9e9ea3", false, 1), layout(), plain);
      for (const cell of document.querySelectorAll(".pictures button")) {
        cell.classList.toggle("chosen", cell.dataset.sample === sampleMenu.value && cell.dataset.head === name);
      }
      viewer.dataset.shown = `${sample.id} ${name}`;
    };
    choose = (sample, head) => {
      sampleMenu.value = sample;
      const heads = Object.keys(data.samples[sample].shapes);
      const kept = head !== undefined && heads.includes(head) ? head : heads.includes(headMenu.value) ? headMenu.value : heads[0];
      headMenu.replaceChildren(...heads.map((own) => new Option(own, own)));
      headMenu.value = kept;
      return draw();
    };
    const follow = (one, other) => {
      let busy = false;
      const move = (event) => {
        if (!event["scene.camera"] || busy) return;
        camera = event["scene.camera"];
        busy = true;
        Plotly.relayout(other, { "scene.camera": camera }).then(() => { busy = false; });
      };
      one.on("plotly_relayout", move);
      one.on("plotly_relayouting", move);
    };
    sampleMenu.addEventListener("change", () => choose(sampleMenu.value));
    headMenu.addEventListener("change", draw);
    colorMenu.addEventListener("change", draw);
    const step = (menu, by) => {
      menu.selectedIndex = (menu.selectedIndex + by + menu.length) % menu.length;
      menu.dispatchEvent(new Event("change"));
    };
    byId("next").addEventListener("click", () => step(sampleMenu, 1));
    byId("previous").addEventListener("click", () => step(sampleMenu, -1));
    viewer.addEventListener("keydown", (event) => {
      if (event.target.tagName === "SELECT" || event.ctrlKey || event.metaKey || event.altKey) return;
      const by = { n: [sampleMenu, 1], p: [sampleMenu, -1], h: [headMenu, 1], e: [colorMenu, 1] }[event.key];
      if (by) step(...by);
    });
    for (const cell of document.querySelectorAll(".pictures button")) {
      cell.addEventListener("click", () => { choose(cell.dataset.sample, cell.dataset.head); viewer.scrollIntoView({ block: "nearest" }); });
    }
    // WebGL costs memory: the shapes are drawn when a reader comes near them.
    const start = () => choose(sampleMenu.value).then(() => { follow(left, right); follow(right, left); viewer.dataset.ready = "yes"; });
    new IntersectionObserver((entries, observer) => {
      if (entries.some((entry) => entry.isIntersecting)) { observer.disconnect(); start(); }
    }, { rootMargin: "600px" }).observe(viewer);
  }
  document.body.dataset.ready = "yes";
})();
