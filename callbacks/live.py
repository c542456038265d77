"""What moves on the page: the script of the slider and of the blind vote, and how both look.

Without scripts nothing is lost but these two: every picture stands on the page by itself, and that is where the script
takes them from, by `data-row` and `data-name`.
"""

STYLE = """
.slider, .ballot { margin: 1rem 0; }
[hidden] { display: none !important; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem 1rem; margin: .6rem 0; max-width: 32rem; }
fieldset { border: 1px solid var(--rule); border-radius: .4rem; padding: .3rem .6rem .5rem; margin: 0; min-width: 0; }
legend { font-size: .8rem; color: var(--soft); padding: 0 .3rem; }
select, button, .save { font: inherit; color: inherit; background: var(--tint); border: 1px solid var(--soft);
  border-radius: .4rem; padding: .3rem .7rem; max-width: 100%; min-height: 2.4rem; }
fieldset select { width: 100%; }
button, .save { cursor: pointer; text-decoration: none; display: inline-block; }
button:hover, .save:hover { border-color: var(--ink); }
.axis { display: block; font-size: .875rem; margin-top: .4rem; }
.axis input { width: 100%; min-height: 1.8rem; accent-color: var(--p0); }
p.record { margin-top: .9rem; }
.stage { position: relative; max-width: 32rem; overflow: hidden; border-radius: .3rem; }
.stage img { display: block; width: 100%; height: auto; }
.stage .over { position: absolute; inset: 0; height: 100%; }
.stage .bar { position: absolute; top: 0; bottom: 0; width: 3px; margin-left: -1.5px; background: #fff;
  box-shadow: 0 0 0 1px #000; pointer-events: none; }
.stage input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; cursor: ew-resize; opacity: 0;
  touch-action: pan-y; }
.stage input::-webkit-slider-thumb { width: 2px; }
.stage input::-moz-range-thumb { width: 2px; }
.stage:focus-within { outline: 3px solid var(--p0); outline-offset: 2px; }
.ballot { max-width: 40rem; padding: .8rem; border: 1px solid var(--rule); border-radius: .5rem; }
.ballot p { margin: .5rem 0; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; }
.two img { display: block; width: 100%; height: auto; border-radius: .3rem; }
.asked img { display: block; width: min(45%, 10rem); height: auto; }
.answers { display: grid; grid-template-columns: 1fr 1fr 1fr; gap: .5rem; }
.strip { display: flex; flex-wrap: wrap; gap: .5rem; align-items: flex-end; margin: .4rem 0; }
.strip span { min-width: 4.5rem; overflow-wrap: anywhere; font-size: .875rem; }
.strip figure { width: 6rem; margin: 0; }
.strip img { display: block; width: 100%; height: auto; }
h4 { margin: 1rem 0 .2rem; font-size: .9rem; }
@media (max-width: 40rem) { .strip figure { width: 4.2rem; } .strip span { width: 100%; } }
@media print { .slider, .booth { display: none; } }
"""

SCRIPT = r"""
'use strict';
(() => {
  const find = (root, what) => root.querySelector(what);
  const all = (root, what) => [...root.querySelectorAll(what)];
  const source = (image) => image.currentSrc || image.src;
  const about = (image) => image.alt.slice(image.dataset.name.length + 2);
  const listed = (images) => new Map(images.map((image) => [image.dataset.row + ' ' + image.dataset.name, image]));
  const shown = listed(all(document, '#pictures ~ .pictures img[data-row]'));
  const scaled = listed(all(document, '.strip img[data-row]'));
  const rows = [...new Set([...shown.values()].map((image) => image.dataset.row))];
  const put = (place, image, alt) => {
    place.src = source(image);
    place.alt = alt;
    place.width = image.width;
    place.height = image.height;
    place.classList.toggle('pixels', image.classList.contains('pixels'));
  };

  const slider = find(document, '.slider');
  if (slider && rows.length) {
    const row = find(slider, '.row'), stage = find(slider, '.stage');
    const divider = find(stage, 'input'), told = find(slider, '.told');
    const arms = all(document, '.strip figure[data-prior]').map((figure) => ({
      prior: figure.dataset.prior, scale: figure.dataset.scale, name: find(figure, 'img').dataset.name,
    }));
    const scales = (name) => {
      const prior = (arms.find((arm) => arm.name === name) || {}).prior;
      const own = arms.filter((arm) => arm.prior === prior);
      return own.filter((arm, i) => own.findIndex((other) => other.name === arm.name) === i);
    };
    for (const i of rows) {
      const image = shown.get(i + ' ' + find(slider, 'fieldset select').value);
      const text = about(image), number = Number(i) + 1;
      row.add(new Option(text === 'condition ' + number ? text : number + ': ' + text, i));
    }
    const sides = all(slider, 'fieldset').map((field) => {
      const select = find(field, 'select'), label = find(field, '.axis'), axis = find(label, 'input');
      for (const option of select.options) {
        if (scales(option.value).length > 1) option.textContent = scales(option.value)[0].prior;
      }
      const reset = () => {
        axis.max = Math.max(0, scales(select.value).length - 1);
        axis.value = Math.max(0, scales(select.value).findIndex((arm) => arm.name === select.value));
      };
      const name = () => {
        const here = scales(select.value), there = scaled.has(row.value + ' ' + select.value);
        return here.length > 1 && there ? here[axis.value].name : select.value;
      };
      const label_axis = () => {
        const here = scales(select.value);
        label.hidden = here.length < 2;
        if (label.hidden) return;
        axis.disabled = !scaled.has(row.value + ' ' + select.value);
        const scale = axis.disabled ? here.find((arm) => arm.name === select.value).scale : here[axis.value].scale;
        axis.setAttribute('aria-valuetext', 'scale ' + scale);
        find(label, 'span').textContent = 'scale ' + scale + (axis.disabled ? ' (the only one at hand here)' : '');
      };
      select.addEventListener('change', () => { reset(); draw(); });
      axis.addEventListener('input', () => draw());
      reset();
      return { select, name, label_axis };
    });
    const draw = () => {
      sides.forEach((side) => side.label_axis());
      const whole = sides.every((side) => side.name() === side.select.value);
      const [over, under] = sides.map((side) => {
        const key = row.value + ' ' + side.name();
        return whole ? shown.get(key) : scaled.get(key) || shown.get(key);
      });
      put(find(stage, '.over'), over, over.alt);
      put(find(stage, '.under'), under, under.alt);
      told.textContent = 'Left ' + sides[0].name() + '; right ' + sides[1].name() + '.';
      slide();
    };
    const slide = () => {
      const share = Number(divider.value);
      find(stage, '.over').style.clipPath = 'inset(0 ' + (100 - share) + '% 0 0)';
      find(stage, '.bar').style.left = share + '%';
      divider.setAttribute('aria-valuetext', share + ' % of the left picture');
    };
    divider.addEventListener('input', slide);
    row.addEventListener('change', draw);
    draw();
    slider.hidden = false;
  }

  const booth = find(document, '.booth');
  if (booth && rows.length) {
    const names = JSON.parse(booth.dataset.names);
    const ballot = find(booth, '.ballot'), start = find(booth, '.start'), save = find(booth, '.save');
    const asked = find(booth, '.asked'), progress = find(booth, '.progress');
    const draw_number = () => crypto.getRandomValues(new Uint32Array(1))[0];
    const identity = draw_number().toString(16).padStart(8, '0') + draw_number().toString(16).padStart(8, '0');
    const votes = [];
    let seed = 0, trials = [];
    const mulberry = (state) => () => {
      state = (state + 0x6D2B79F5) | 0;
      let t = Math.imul(state ^ (state >>> 15), 1 | state);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
    const prepare = () => {
      const random = mulberry(seed), made = [];
      for (const row of rows) {
        for (let a = 0; a < names.length; a++) {
          for (let b = a + 1; b < names.length; b++) {
            const pair = random() < 0.5 ? [names[a], names[b]] : [names[b], names[a]];
            const [left, right] = pair.map((name) => shown.get(row + ' ' + name));
            if (left && right && source(left) !== source(right)) made.push({ row, pair, left, right });
          }
        }
      }
      for (let i = made.length - 1; i > 0; i--) {
        const j = Math.floor(random() * (i + 1));
        [made[i], made[j]] = [made[j], made[i]];
      }
      return made;
    };
    const draw = () => {
      const trial = trials[votes.length];
      for (const part of ['.two', '.answers', '.asked']) find(ballot, part).style.display = trial ? '' : 'none';
      find(ballot, '.undo').disabled = !votes.length;
      save.hidden = !votes.length;
      progress.textContent = trial
        ? 'Pair ' + (votes.length + 1) + ' of ' + trials.length
        : trials.length ? 'All ' + trials.length + ' pairs are voted on: save the votes.' : 'No two pictures differ.';
      save.textContent = 'Save the votes (' + votes.length + ')';
      save.download = 'votes-' + identity + '.json';
      save.href = 'data:application/json,' + encodeURIComponent(JSON.stringify({
        format: booth.dataset.format, comparison: booth.dataset.comparison, ballot: identity, seed, votes,
      }, null, 1));
      if (!trial) return;
      const condition = shown.get(trial.row + ' condition');
      find(asked, 'img').hidden = !condition;
      if (condition) put(find(asked, 'img'), condition, 'what was asked for');
      find(asked, 'figcaption').textContent = about(trial.left);
      put(find(ballot, '.left'), trial.left, 'the left picture');
      put(find(ballot, '.right'), trial.right, 'the right picture');
    };
    const choose = (choice) => {
      const trial = trials[votes.length];
      if (!trial) return;
      votes.push({ condition: Number(trial.row), left: trial.pair[0], right: trial.pair[1], choice });
      draw();
    };
    const undo = () => { votes.pop(); draw(); };
    start.addEventListener('click', () => {
      seed = Number(booth.dataset.seed || draw_number());
      trials = prepare();
      start.hidden = true;
      ballot.hidden = false;
      draw();
      ballot.focus();
    });
    all(ballot, '[data-choice]').forEach((button) =>
      button.addEventListener('click', () => choose(button.dataset.choice)));
    find(ballot, '.undo').addEventListener('click', undo);
    ballot.addEventListener('keydown', (event) => {
      const choice = { ArrowLeft: 'left', ArrowRight: 'right', ArrowDown: 'same' }[event.key];
      if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
      if (choice) choose(choice);
      else if (event.key === 'Backspace') undo();
      else return;
      event.preventDefault();
    });
    booth.hidden = false;
  }
})();
"""
