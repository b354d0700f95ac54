for (const figure of document.querySelectorAll(".slices")) {
  const frames = [...figure.querySelectorAll(".frame")], bar = figure.querySelector(".bar");
  const input = bar.querySelector("input"), said = bar.querySelector("output");
  const show = () => {
    frames.forEach((frame, k) => frame.classList.toggle("on", k === Number(input.value)));
    const name = frames[Number(input.value)].dataset.name;
    said.value = name;
    input.setAttribute("aria-valuetext", name);
  };
  input.addEventListener("input", show);
  figure.classList.add("live");
  bar.hidden = false;
  show();
}
