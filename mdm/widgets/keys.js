// Keys of the sampler widget: Ctrl+Enter runs, arrows turn the large pictures over. Presses of buttons that are HTML.
function render({ model, el }) {
  const root = () => el.closest('.mdm-sampler');
  const ready = () => {
    if (!root()) return setTimeout(ready, 100);
    root().setAttribute('data-lm-suppress-shortcuts', 'true');    // JupyterLab would run the cell again
    root().classList.add('mdm-has-keys');
    root().addEventListener('click', use);
  };
  const turn = (open, by) => {
    const all = [...open.closest('.mdm-grid').querySelectorAll('[popover]')];
    const other = all[(all.indexOf(open) + by + all.length)%all.length];
    open.hidePopover();
    other.showPopover();
    return other;
  };
  const use = e => {
    const by = e.target.closest('.mdm-turn')?.dataset.by;
    if (by) return turn(e.target.closest('[popover]'), +by).querySelector(`.mdm-turn[data-by="${by}"]`).focus();
    const button = e.target.closest('.mdm-use');
    if (!button) return;
    button.closest('[popover]').hidePopover();
    model.send({ use: button.dataset.picture });
  };
  const press = e => {
    const open = root() && root().querySelector('[popover]:popover-open');
    const by = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
    if (open && by && e.target.type != 'radio') { e.preventDefault(); return turn(open, by); }
    if (e.key != 'Enter' || !(e.ctrlKey || e.metaKey) || !root() || !root().contains(e.target)) return;
    e.preventDefault();
    e.stopPropagation();
    e.target.dispatchEvent(new Event('change', { bubbles: true }));  // a number that was just typed
    model.send({ press: 'run' });
  };
  model.on('msg:custom', message => {                               // a file was made: save it, as if its link had been pressed
    if (message.save) setTimeout(() => root().querySelector('.mdm-made a')?.click(), 200);
  });
  document.addEventListener('keydown', press, true);
  ready();
  return () => document.removeEventListener('keydown', press, true);
}
export default { render };
