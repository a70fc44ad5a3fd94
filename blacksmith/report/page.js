(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const state = {axis: "step", log: false, hidden: new Set()};

  // The same range for all curves, so that the panels line up.
  const timeAxis = () => {
    const x = figures.flatMap((figure) => figure.axes).flatMap((axes) => axes[state.axis]);
    const low = x.reduce((a, b) => Math.min(a, b), Infinity);
    const high = x.reduce((a, b) => Math.max(a, b), -Infinity);
    const margin = high > low ? 0.02 * (high - low) : Math.max(1, low / 2);
    const range = [low - margin, high + margin];
    const ticks = state.axis === "step" && range[1] - range[0] < 8 ? {dtick: 1} : {};
    return {title: {text: state.axis}, range, ...ticks};
  };

  const template = () => {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const axis = {
      gridcolor: color("--line"), linecolor: color("--line"), zerolinecolor: color("--line"),
      tickcolor: color("--line"), automargin: true, title: {standoff: 8, font: {size: 12}},
      tickfont: {color: color("--muted")}, ticklabelstandoff: 4,
      spikecolor: color("--muted"), spikethickness: 1, spikedash: "dot",
    };
    const label = {bgcolor: color("--panel"), bordercolor: color("--line"), namelength: 40,
      font: {color: color("--ink"), size: 12}};
    return {layout: {
      font: {family: getComputedStyle(document.body).fontFamily, size: 11.5, color: color("--ink")},
      paper_bgcolor: color("--panel"), plot_bgcolor: color("--panel"), hoverlabel: label,
      xaxis: axis, yaxis: axis, margin: {l: 46, r: 14, t: 10, b: 40}, showlegend: false,
    }, data: {heatmap: [{textfont: {color: color("--ink")}, showscale: false, hoverongaps: false, xgap: 2, ygap: 2}]}};
  };

  const draw = (figure) => {
    // One hover box for all curves, unless there are so many that it would hide the plot.
    const unified = figure.data[0]?.type === "scatter" && figure.data.length <= 6;
    const data = figure.data.map((trace, index) => ({
      ...(unified ? {} : {hovertemplate: "%{fullData.name}<br>%{y} at %{x}<extra></extra>"}),
      ...trace,
      ...(figure.axes.length ? {x: figure.axes[index][state.axis]} : {}),
      visible: !figure.groups[index]?.some((group) => state.hidden.has(group)),
    }));
    const layout = {template: template(), dragmode: touch ? false : "zoom",
      hovermode: unified ? "x unified" : "closest", uirevision: `${state.axis} ${state.log}`, ...structuredClone(figure.layout)};
    if (figure.axes.length) layout.xaxis = timeAxis();
    if (figure.log && state.log) {
      const {range, ...axis} = layout.yaxis;
      layout.yaxis = {...axis, type: "log", tickformat: ".3~g"};
    }
    return Plotly.react(figure.id, data, layout,
      {responsive: true, displayModeBar: false});
  };
  const drawAll = () => figures.forEach(draw);

  for (const button of document.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      const {group, axis} = button.dataset;
      const press = (element, on) => element.setAttribute("aria-pressed", String(on));
      if (group !== undefined) {
        if (!state.hidden.delete(group)) state.hidden.add(group);
        press(button, !state.hidden.has(group));
      } else if (axis !== undefined) {
        state.axis = axis;
        document.querySelectorAll("[data-axis]").forEach((other) => press(other, other === button));
      } else {
        state.log = !state.log;
        press(button, state.log);
      }
      drawAll();
    });
  }
  dark.addEventListener("change", drawAll);
  drawAll();
})();
