// Filters the samples. Without scripts the form stays hidden and every sample is shown.
(() => {
  const form = document.getElementById("filter");
  const cards = [...document.querySelectorAll("article.sample")];
  const texts = cards.map((card) => [...card.querySelectorAll(".text")].map((node) => node.textContent).join("\n").toLowerCase());
  const apply = () => {
    const wanted = new FormData(form);
    const text = (wanted.get("text") || "").trim().toLowerCase();
    const family = wanted.get("family") || "";
    const winner = wanted.get("winner") || "";
    let shown = 0;
    cards.forEach((card, i) => {
      card.hidden = !((!family || card.dataset.family === family) && (!winner || card.dataset.winner === winner) && texts[i].includes(text));
      shown += card.hidden ? 0 : 1;
    });
    form.querySelector("output").textContent = shown ? `${shown} of ${cards.length} shown` : "No sample fits.";
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
})();
