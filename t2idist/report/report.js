"use strict";
const short = (v) => {
  const size = Math.abs(v);
  if (size >= 999500) return (v / 1e6).toPrecision(3) + "M";
  if (size >= 10000) return (v / 1e3).toPrecision(3) + "k";
  if (size >= 100) return v.toFixed(0);
  return size >= 1e-3 || v === 0 ? String(Number(v.toPrecision(3))) : v.toExponential(1);
};

// Images over time: a slider, thumbnails and a play button.
for (const box of document.querySelectorAll(".over-time")) {
  const images = [...box.querySelectorAll(".image")];
  const thumbs = [...box.querySelectorAll(".thumbs button")];
  const slider = box.querySelector("input");
  const output = box.querySelector("output");
  const play = box.querySelector(".bar button");
  let timer = 0;
  const show = (index) => {
    images.forEach((image, i) => { image.hidden = i !== index; });
    thumbs.forEach((thumb, i) => thumb.setAttribute("aria-pressed", String(i === index)));
    slider.value = index;
    output.textContent = images[index].dataset.label;
  };
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = "Play"; };
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  thumbs.forEach((thumb, i) => thumb.addEventListener("click", () => { stop(); show(i); }));
  play.addEventListener("click", () => {
    if (timer) { stop(); return; }
    let index = 0;
    play.textContent = "Stop";
    show(0);
    timer = setInterval(() => { index += 1; show(index); if (index === images.length - 1) stop(); }, 700);
  });
  show(images.length - 1);
}

// Values under the pointer.
const charts = JSON.parse(document.getElementById("chart-values").textContent);
for (const figure of document.querySelectorAll(".chart")) {
  const { width, series } = charts[Number(figure.dataset.chart)];
  const svg = figure.querySelector("svg");
  const pointer = svg.querySelector(".pointer");
  const dots = [...svg.querySelectorAll(".dot")];
  const tip = figure.querySelector(".tip");
  const hide = () => { pointer.toggleAttribute("hidden", true); tip.hidden = true; dots.forEach((d) => d.toggleAttribute("hidden", true)); };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const x = (event.clientX - frame.left) * width / frame.width;
    tip.replaceChildren();
    let images = 0;
    let across = 0;
    const rows = series.map((line, i) => {
      let best = 0;
      line.at.forEach((point, k) => { if (Math.abs(point[0] - x) < Math.abs(line.at[best][0] - x)) best = k; });
      const dot = dots[i];
      dot.setAttribute("cx", line.at[best][0]);
      dot.setAttribute("cy", line.at[best][1]);
      dot.toggleAttribute("hidden", false);
      images = Math.max(images, line.x[best]);
      across = Math.max(across, line.at[best][0]);
      const row = document.createElement("div");
      row.className = "s" + (i % 8);
      row.append(document.createElement("i"), line.name + "  " + short(line.y[best]));
      return row;
    });
    const head = document.createElement("b");
    head.textContent = Math.round(images).toLocaleString("en") + " images";
    tip.append(head, ...rows);
    pointer.setAttribute("x1", across);
    pointer.setAttribute("x2", across);
    pointer.toggleAttribute("hidden", false);
    tip.hidden = false;
    const left = across * frame.width / width;
    tip.style.left = (left > frame.width / 2 ? left - tip.offsetWidth - 12 : left + 12) + "px";
  });
}

// Copy buttons.
for (const box of document.querySelectorAll(".copyable")) {
  const button = box.querySelector("button");
  button.addEventListener("click", async () => {
    const text = box.querySelector("pre");
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
