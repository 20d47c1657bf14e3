"use strict";

// Denoising as a picture, for the report and the served page: a completion's tokens, or the cells of a Sudoku, coloured by
// the model call that decided them; and the controls that step through the calls. Text by a model is inserted as text.
const denoising = (() => {
  // Draws a completion into an element. pieces: texts, null where masked; since: the calls that decided them, from 0;
  // call: the calls so far, of `calls`; confidence: by position, if known; blockLength: 0 for one block; given: the
  // prompt's tokens in the first block; what lies behind the block that is being decided is faded; grid: a Sudoku's
  // { puzzle, box }, and wrong: its cells that are.
  function draw(board, { pieces, since, call, calls, confidence, blockLength, given = 0, grid, wrong }) {
    const number = grid ? grid.puzzle.length : pieces.length;
    board.className = grid ? "grid" : "tokens";
    if (grid) board.style.setProperty("--side", grid.box ** 2);
    while (board.children.length < number) board.append(document.createElement("span"));
    while (board.children.length > number) board.lastChild.remove();
    const blockOf = (i) => Math.floor((i + given) / blockLength), current = pieces.findIndex((piece) => piece === null);
    [...board.children].forEach((token, i) => {
      const piece = pieces[i] ?? null, isDecided = piece !== null;
      const classes = ["token", !isDecided && "masked", isDecided && since[i] === call - 1 && "new"];
      if (blockLength && i && (i + given) % blockLength === 0) classes.push("block");
      if (blockLength && piece === null && blockOf(i) > blockOf(current)) classes.push("ahead");
      if (grid) classes.push(...cell(grid, i), isDecided && wrong.includes(i) && "wrong");
      token.className = classes.filter(Boolean).join(" ");
      token.textContent = isDecided ? piece : grid && grid.puzzle[i] !== "0" ? grid.puzzle[i] : "·";
      const sure = confidence?.[i];
      token.title = isDecided ? `call ${since[i] + 1}` + (sure === undefined ? "" : `, confidence ${sure.toFixed(3)}`) : "not decided";
      token.style.setProperty("--when", isDecided && calls > 1 ? since[i] / (calls - 1) : 0);
      token.style.setProperty("--sure", isDecided ? sure ?? 0 : 0);
    });
  }

  // The classes of a Sudoku's cell: given, and the edges of its box.
  function cell({ puzzle, box }, i) {
    const side = box ** 2, row = Math.floor(i / side), column = i % side;
    return [puzzle[i] !== "0" && "given", column && column % box === 0 && "left", row && row % box === 0 && "top"];
  }

  // Finds a slider, a button .play and a select .speed in an element, and calls show(call) as they are used.
  function control(element, show) {
    const [slider, button, speed] = ["input[type=range]", ".play", ".speed"].map((name) => element.querySelector(name));
    let timer, isWaiting = false;
    const last = () => Number(slider.max), at = () => Number(slider.value);

    function go(call) {
      slider.value = call;
      slider.setAttribute("aria-valuetext", `call ${call} of ${last()}`);
      show(at());
    }
    function stop() {
      clearTimeout(timer);
      timer = undefined;
      isWaiting = false;
      button.textContent = at() >= last() ? "Replay" : "Play";
    }
    function step() {
      if (at() >= last()) {
        stop();
        isWaiting = true;  // for calls that are still to come
        return;
      }
      button.textContent = "Pause";
      timer = setTimeout(() => { go(at() + 1); step(); }, Math.max(30, Math.min(350, 8000 / last())) * Number(speed.value));
    }
    function play() {
      if (at() >= last()) go(0);
      step();
    }
    button.addEventListener("click", () => (timer === undefined ? play() : stop()));
    slider.addEventListener("input", () => { go(at()); stop(); });
    // Shows an animation of so many calls at one of them.
    function load(calls, call) {
      slider.max = calls;
      go(call);
      stop();
    }
    // Takes a further call, which is played if those before it were played to their end.
    function extend(calls) {
      slider.max = calls;
      if (isWaiting) step();
    }
    return { load, play, extend };
  }

  return { draw, control };
})();
