// Previews: one at a time, chosen by the slider. Without scripts all of them are seen, one below the other.
for (const box of document.querySelectorAll(".slider")) {
  const frames = [...box.querySelectorAll("figure")];
  const input = box.querySelector("input");
  const show = () => frames.forEach((frame, i) => { frame.hidden = i !== Number(input.value); });
  input.max = frames.length - 1;
  input.value = frames.length - 1;
  input.hidden = false;
  input.addEventListener("input", show);
  show();
}
