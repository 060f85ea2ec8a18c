// Draw every chart again where scripts run: with tooltips, legends to click, and the width of the screen.
for (const plot of document.querySelectorAll("[data-spec]")) {
  const spec = JSON.parse(document.getElementById(plot.dataset.spec).textContent);
  const drawn = document.createElement("div");
  drawn.className = "live";
  plot.append(drawn);
  vegaEmbed(drawn, spec, {
    ast: true, // evaluates expressions without eval, which the page forbids
    renderer: "svg",
    actions: false,
    tooltip: { theme: matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light" },
  }).then(
    () => plot.classList.add("drawn"),
    (error) => { drawn.remove(); console.error(error); },
  );
}
