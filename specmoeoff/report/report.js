// Without this script every roof and point is shown and tells its numbers as a title.
const tip = document.getElementById('tip'), off = new Set();
const marks = [...document.querySelectorAll('[data-groups]')];
for (const mark of marks) {
  const title = mark.querySelector('title'), text = title.textContent;
  title.remove();  // else the browser shows it beside ours
  mark.setAttribute('aria-label', text);
  mark.onmousemove = (event) => {
    tip.textContent = text;
    tip.hidden = false;
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + 'px';
    tip.style.top = event.clientY + 14 + 'px';
  };
  mark.onmouseleave = () => { tip.hidden = true; };
}
for (const list of document.querySelectorAll('.groups')) {
  list.hidden = false;
  list.onchange = ({ target }) => {
    off[target.checked ? 'delete' : 'add'](target.value);
    for (const mark of marks) mark.style.display = mark.dataset.groups.split('|').some((g) => off.has(g)) ? 'none' : '';
  };
}
document.documentElement.dataset.marks = marks.length;
