// The report's charts. Everything is read from the JSON in #data; text from trials is escaped before plotly sees it,
// because plotly takes a subset of HTML in labels.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const axes = new Map(data.axes.map((axis) => [axis.name, axis]));
  const objectives = data.axes.filter((axis) => axis.maximize !== null);
  const complete = data.trials.filter((trial) => trial.complete);
  const narrow = window.matchMedia("(max-width: 720px)");
  const $ = (id) => document.getElementById(id);

  const safe = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const font = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';

  function hover(trial) {
    const lines = [`<b>trial ${trial.number}</b>${trial.base ? " (base model)" : ""}`];
    // one method a line: hover boxes do not wrap
    lines.push(...trial.strategy.split(" + ").map((part, i) => (i ? "+ " : "") + safe(part)));
    for (const { name, label } of objectives) {
      if (name in trial.text) lines.push(`${safe(label)} ${safe(trial.text[name])}`);
    }
    return lines.join("<br>");
  }

  // a phone has no room for the buttons; nothing leaves this page, so there is no server to send a chart to
  const config = () => ({
    displaylogo: false, responsive: true, displayModeBar: !narrow.matches, showSendToCloud: false, plotlyServerURL: "",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "hoverClosest3d", "tableRotation"],
    toImageButtonOptions: { filename: "winnow-front", scale: 2 },
  });

  function layout(more) {
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
      font: { family: font, size: 13, color: colour("muted") },
      hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), align: "left",
                    font: { family: font, size: 13, color: colour("text") } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("other"), activecolor: colour("text") },
      margin: narrow.matches ? { l: 44, r: 12, t: 30, b: 48 } : { l: 64, r: 16, t: 30, b: 52 },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { color: colour("text") } },
      ...more,
    };
  }

  const scaleOf = (title, more) => ({
    title: { text: title, standoff: 12, font: { color: colour("text") } }, gridcolor: colour("line"), zeroline: false,
    linecolor: colour("line"), ticks: "", automargin: true, ...more,
  });

  // the three kinds of complete trials, each drawn as a series; the base model last, on top
  function kinds() {
    return [
      { name: "dominated", symbol: "circle", size: 8, colour: colour("other"), opacity: 0.75,
        of: (t) => !t.front && !t.base },
      { name: "on the front", symbol: "circle", size: 12, colour: colour("front"), opacity: 1,
        of: (t) => t.front && !t.base },
      { name: data.trials.some((t) => t.base && t.front) ? "base model, on the front" : "base model",
        symbol: "diamond", size: 13, colour: colour("base"), opacity: 1, of: (t) => t.base },
    ];
  }

  const having = (names) => complete.filter((t) => names.every((name) => name in t.values));

  // what no other trial beats on these two axes: [x, y] by x
  function steps(x, y) {
    const better = (axis, a, b) => (axis.maximize ? a > b : a < b);
    const known = having([x.name, y.name]).map((t) => [t.values[x.name], t.values[y.name]]);
    known.sort((a, b) => (a[0] === b[0] ? (better(y, a[1], b[1]) ? -1 : 1) : better(x, a[0], b[0]) ? -1 : 1));
    const kept = [];
    for (const point of known) {
      if (!kept.length || better(y, point[1], kept[kept.length - 1][1])) kept.push(point);
    }
    return kept;
  }

  function drawFront() {
    const x = axes.get($("x-axis").value), y = axes.get($("y-axis").value);
    const log = $("log-axis").checked;
    const traces = [];
    const line = x.maximize !== null && y.maximize !== null && x !== y ? steps(x, y) : [];
    // only the steps' corners are numbered: the front's other trials crowd around them
    const corner = (t) => t.base || line.some((p) => p[0] === t.values[x.name] && p[1] === t.values[y.name]);
    if (line.length) {
      traces.push({ x: line.map((p) => p[0]), y: line.map((p) => p[1]), mode: "lines", hoverinfo: "skip",
        name: "best of these two", line: { shape: "hv", color: colour("front"), width: 1.5, dash: "dot" } });
    }
    for (const kind of kinds()) {
      const trials = having([x.name, y.name]).filter(kind.of);
      if (!trials.length) continue;
      const labelled = kind.size > 8 && trials.length <= 40;
      traces.push({
        x: trials.map((t) => t.values[x.name]), y: trials.map((t) => t.values[y.name]), name: kind.name,
        mode: labelled ? "markers+text" : "markers", text: labelled ? trials.map((t) => (corner(t) ? String(t.number) : "")) : undefined,
        textposition: `${y.maximize === false ? "bottom" : "top"} ${x.maximize === true ? "right" : "left"}`, textfont: { size: 11.5, color: kind.colour }, cliponaxis: false,
        customdata: trials.map((t) => t.number), hovertext: trials.map(hover), hovertemplate: "%{hovertext}<extra></extra>",
        marker: { symbol: kind.symbol, size: kind.size, color: kind.colour, opacity: kind.opacity,
                  line: { color: colour("card"), width: 1.5 } },
      });
    }
    const ends = [x, y].map((axis, i) =>
      axis.maximize === null ? "" : [["to the left", "to the right"], ["down", "up"]][i][Number(axis.maximize)]);
    const known = ends.filter(Boolean);
    $("better").textContent = (known.length ? `Better is ${known.join(" and ")}. ` : "") +
      `${having([x.name, y.name]).length} of ${data.trials.length} trials have both figures. Pick a point to see its trial.`;
    const side = (axis) => safe(axis.title) + (axis.better ? `, ${axis.better}` : "");
    Plotly.react("plot-front", traces, layout({
      xaxis: scaleOf(side(x), log ? { type: "log", tickformat: "~g" } : {}), yaxis: scaleOf(side(y)),
    }), config());
  }

  function draw3d() {
    const [x, y, z] = ["x-3d", "y-3d", "z-3d"].map((id) => axes.get($(id).value));
    const names = [x, y, z].map((axis) => axis.name);
    const traces = kinds().flatMap((kind) => {
      const trials = having(names).filter(kind.of);
      return trials.length ? [{
        type: "scatter3d", mode: "markers", name: kind.name, customdata: trials.map((t) => t.number),
        x: trials.map((t) => t.values[x.name]), y: trials.map((t) => t.values[y.name]), z: trials.map((t) => t.values[z.name]),
        hovertext: trials.map(hover), hovertemplate: "%{hovertext}<extra></extra>",
        marker: { symbol: kind.symbol, size: kind.size / 2 + 0.5, color: kind.colour, opacity: kind.opacity,
                  line: { color: colour("card"), width: 1 } },
      }] : [];
    });
    const scene = (axis) => ({
      title: { text: safe(axis.title), font: { size: 12, color: colour("text") } }, gridcolor: colour("line"),
      zerolinecolor: colour("line"), backgroundcolor: colour("card"), showspikes: false, nticks: 6, tickfont: { size: 11 },
    });
    Plotly.react("plot-3d", traces, layout({
      margin: { l: 0, r: 0, t: 0, b: 0 }, uirevision: names.join(), showlegend: !narrow.matches,
      legend: { orientation: "h", y: 0, yanchor: "bottom", x: 0, font: { color: colour("text") } },
      scene: { xaxis: scene(x), yaxis: scene(y), zaxis: scene(z), aspectmode: "cube", domain: { y: [0.06, 1] },
               camera: { eye: { x: 1.35, y: -1.5, z: 0.7 }, center: { x: 0, y: 0, z: -0.12 } } },
    }), config());
  }

  function drawVolume() {
    const numbers = data.trials.map((t) => t.number);
    const volume = (t) => data.hypervolume[numbers.indexOf(t.number)];
    const stopped = data.trials.filter((t) => t.stopped);
    const failed = data.trials.filter((t) => !t.complete && !t.stopped);
    const front = data.trials.filter((t) => t.front);
    const marks = (trials, name, marker, text) => ({
      x: trials.map((t) => t.number), y: trials.map(volume), mode: "markers", name, marker, cliponaxis: false,
      customdata: trials.map((t) => t.number), hovertext: trials.map(text), hovertemplate: "%{hovertext}<extra></extra>",
    });
    Plotly.react("plot-volume", [
      { x: numbers, y: data.hypervolume, mode: "lines", name: "hypervolume", hoverinfo: "skip",
        line: { shape: "hv", color: colour("front"), width: 2 }, showlegend: false },
      marks(front, "on the front", { size: 9, color: colour("front"), line: { color: colour("card"), width: 1.5 } }, hover),
      marks(stopped, "stopped early", { symbol: "line-ns", size: 9, line: { color: colour("muted"), width: 2 } },
        (t) => `<b>trial ${t.number}</b><br>${safe(t.strategy)}<br>stopped early: ${safe(t.reason)}`),
      marks(failed, "failed", { symbol: "x-thin", size: 9, line: { color: colour("failed"), width: 2 } },
        (t) => `<b>trial ${t.number}</b><br>${safe(t.strategy)}<br>failed: ${safe(t.reason)}`),
    ].filter((trace) => trace.x.length), layout({
      xaxis: scaleOf("trial", { rangemode: "tozero", tickformat: "d", ...(numbers.length <= 12 && { dtick: 1 }) }),
      yaxis: scaleOf("hypervolume", { rangemode: "tozero" }),
    }), config());
  }

  function drawParallel() {
    const shared = data.axes.filter((a) => complete.every((t) => a.name in t.values));
    // drawn in order: the front over the others
    const rank = (t) => (t.base ? 2 : t.front ? 1 : 0);
    const trials = [...complete].sort((a, b) => rank(a) - rank(b));
    const dimensions = shared.slice(0, narrow.matches ? 3 : 9).map((axis) => {
      const values = trials.map((t) => t.values[axis.name]);
      const low = Math.min(...values), high = Math.max(...values), pad = low === high ? Math.abs(low) * 0.05 || 1 : 0;
      const range = [low - pad, high + pad];
      return { label: safe(axis.title), values, range: axis.maximize === false ? range.reverse() : range };
    });
    const steps = [colour("other"), colour("front"), colour("base")];
    const scale = steps.flatMap((c, i) => [[i / 3, c], [(i + 1) / 3, c]]);
    Plotly.react("plot-parallel", [{
      type: "parcoords", dimensions, labelfont: { color: colour("text"), size: 13 }, tickfont: { color: colour("muted"), size: 11 },
      rangefont: { color: "rgba(0,0,0,0)", size: 11 }, unselected: { line: { color: colour("other"), opacity: 0.12 } },
      line: { color: trials.map(rank), colorscale: scale, cmin: -0.5, cmax: 2.5, showscale: false },
    }], layout({ margin: { l: 56, r: 56, t: 56, b: 20 } }), { ...config(), displayModeBar: false });
  }

  function fill(id, chosen) {
    $(id).replaceChildren(...data.axes.map((axis) => new Option(axis.label, axis.name, false, axis.name === chosen)));
  }

  function empty(id, text) {
    $(id).classList.add("empty");
    $(id).textContent = text;
  }

  const score = objectives.find((axis) => axis.maximize) || data.axes[1] || data.axes[0];
  const costs = data.axes.filter((axis) => axis !== score);
  const draws = [];
  const picks = [];

  function chart(id, draw, selects) {
    draw();
    draws.push(draw);
    selects.forEach((select) => $(select).addEventListener("change", draw));
    $(id).on("plotly_click", (event) => {
      const number = event.points[0] && event.points[0].customdata;
      if (number !== undefined) picks.forEach((pick) => pick(number));
    });
  }

  if (!complete.length || !data.axes.length) {
    ["plot-front", "plot-3d", "plot-parallel", "plot-volume"].forEach((id) => empty(id, "No trial is complete yet."));
  } else {
    fill("x-axis", (costs[0] || score).name);
    fill("y-axis", score.name);
    chart("plot-front", drawFront, ["x-axis", "y-axis", "log-axis"]);
    chart("plot-volume", drawVolume, []);
    const canvas = document.createElement("canvas");
    const webgl = canvas.getContext("webgl") || canvas.getContext("experimental-webgl");
    if (!webgl) {
      ["plot-3d", "plot-parallel"].forEach((id) => empty(id, "This chart needs WebGL, which this browser has switched off."));
    } else {
      if (data.axes.length < 3) $("card-3d").remove();
      else {
        [["x-3d", costs[0]], ["y-3d", costs[1]], ["z-3d", score]].forEach(([id, axis]) => fill(id, axis.name));
        chart("plot-3d", draw3d, ["x-3d", "y-3d", "z-3d"]);
      }
      chart("plot-parallel", drawParallel, []);
      const watch = () => $("plot-parallel").on("plotly_restyle", () => { $("clear-ranges").hidden = false; });
      watch();
      $("clear-ranges").addEventListener("click", () => {
        Plotly.purge("plot-parallel"); // with its listeners
        drawParallel();
        watch();
        $("clear-ranges").hidden = true;
      });
    }
  }
  const again = () => draws.forEach((draw) => draw());
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  narrow.addEventListener("change", again);
  window.winnow = { onPick: (pick) => picks.push(pick) };
})();
