"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const places = [];
  const cell = {
    value: (value) => (value > 0 ? Math.log10(value) : null),
    zero: (value) => (value === 0 ? 0 : null),
    notFinite: (value) => (value === null ? 0 : null),
  };

  for (const [name, { data, layout }] of Object.entries(charts)) {
    const values = data[0].customdata;
    for (const trace of data.filter(({ type }) => type === "heatmap")) {
      trace.z = values.map((row) => row.map(cell[trace.meta ?? "value"]));
    }
    const place = document.getElementById(`chart-${name}`);
    Plotly.newPlot(place, data, layout, { displayModeBar: false, responsive: true });
    places.push(place);
  }

  // Paper is narrower than most windows, and nobody can open a table there.
  const details = [...document.querySelectorAll("details")];
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = details.filter((element) => !element.open);
    opened.forEach((element) => (element.open = true));
    places.forEach((place) => Plotly.relayout(place, { width: 680, autosize: false }));
  });
  addEventListener("afterprint", () => {
    opened.forEach((element) => (element.open = false));
    places.forEach((place) => Plotly.relayout(place, { width: null, autosize: true }));
  });
})();
