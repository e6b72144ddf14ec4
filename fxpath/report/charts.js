"use strict";

// Pictures from plain data: each function draws into an element, at its present width, and knows
// neither the page nor what is chosen in it.
const charts = (() => {
  const margin = { left: 64, right: 22, top: 26, bottom: 40 };
  const superscripts = "⁰¹²³⁴⁵⁶⁷⁸⁹";

  function node(parent, name, attributes = {}, text = null) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== null) made.textContent = text;
    parent.append(made);
    return made;
  }

  function power(exponent) {
    const digits = [...String(Math.abs(exponent))].map((digit) => superscripts[digit]).join("");
    return `10${exponent < 0 ? "⁻" : ""}${digits}`;
  }

  function short(value) {
    for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (value >= size) return `${+(value / size).toPrecision(3)}${unit}`;
    return String(+value.toPrecision(3));
  }

  const percent = (value) => `${+(100 * value).toPrecision(3)}%`;

  // From 0 to a round number above the largest value, at steps of 1, 2 or 5 times a power of ten.
  function linear(values, kind, most = 5) {
    const high = Math.max(...values.filter(Number.isFinite), 0) || 1;
    const raw = high / most;
    const unit = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((factor) => factor * unit).find((s) => s >= raw * 0.999);
    const top = Math.ceil(high / step - 1e-9) * step;
    const ticks = [];
    for (let i = 0; i * step <= top * 1.0001; i++)
      ticks.push({ at: (i * step) / top, text: (kind === "part" ? percent : short)(i * step) });
    return { ticks, at: (value) => value / top };
  }

  // Whole decades; zeros, and what is below a floor, lie on a line of their own below the lowest.
  function logarithmic(values, kind, floor = 0) {
    const most = 6;
    const seen = (value) => value > 0 && value >= floor;
    const positive = values.filter(seen);
    const zeros = values.some((value) => value !== null && !seen(value));
    const lowest = positive.length ? Math.floor(Math.log10(Math.min(...positive)) + 1e-9) : -1;
    const high = Math.max(
      lowest + 1, positive.length ? Math.ceil(Math.log10(Math.max(...positive)) - 1e-9) : 0);
    const step = Math.ceil((high - lowest) / most);
    const low = high - step * Math.ceil((high - lowest) / step);
    const ground = zeros ? 0.08 : 0;
    const at = (exponent) => ground + ((1 - ground) * (exponent - low)) / (high - low);
    const ticks = zeros ? [{ at: 0, text: floor ? "less" : "0" }] : [];
    for (let e = high; e >= low; e -= step) {
      const text = kind !== "part" ? power(e) : e >= -4 ? percent(10 ** e) : `${power(e + 2)}%`;
      ticks.push({ at: at(e), text });
    }
    return { ticks, at: (value) => (seen(value) ? at(Math.log10(value)) : 0) };
  }

  // An empty chart with its axes: where the drawing goes, and how values become pixels.
  function frame(parent, { title, about, height, y, yName, xName, xTicks, below = 0 }) {
    const width = Math.max(280, parent.clientWidth);
    const inner = {
      width: width - margin.left - margin.right,
      height: height - margin.top - margin.bottom - below };
    const viewBox = `0 0 ${width} ${height}`;
    const svg = node(parent, "svg", { width, height, viewBox, role: "img" });
    const id = parent.id;
    node(svg, "title", { id: `${id}-title` }, title);
    node(svg, "desc", { id: `${id}-about` }, about);
    svg.setAttribute("aria-labelledby", `${id}-title`);
    svg.setAttribute("aria-describedby", `${id}-about`);
    const px = (part) => margin.left + part * inner.width;
    const py = (part) => margin.top + (1 - part) * inner.height;
    node(svg, "text", { x: 0, y: 12, class: "axis-name" }, yName);
    for (const { at, text } of y.ticks) {
      node(svg, "line", { x1: px(0), x2: px(1), y1: py(at), y2: py(at), class: "grid" });
      node(svg, "text", { x: margin.left - 8, y: py(at) + 4, class: "tick end" }, text);
    }
    for (const { at, text } of xTicks)
      node(svg, "text", { x: px(at), y: py(0) + 17, class: "tick middle" }, text);
    node(svg, "text", { x: px(0.5), y: height - 4, class: "axis-name middle" }, xName);
    return { svg, px, py, inner };
  }

  const replace = (parent) => (parent.replaceChildren(), parent);

  // Numbers of layers below the axis, round ones, and as many as there is room for.
  function orderTicks(count, width) {
    const steps = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000];
    const step = steps.find((s) => count / s <= width / 44) ?? 2000;
    const ticks = [];
    for (let n = step; n <= count; n += step)
      ticks.push({ at: (n - 0.5) / count, text: String(n) });
    if (step > 1) ticks.unshift({ at: 0.5 / count, text: "1" });
    return ticks;
  }

  // Modules as brackets below the numbers of their layers, named where there is room.
  function brackets({ svg, px, py }, groups, count) {
    for (const { name, from, to } of groups) {
      const [left, right] = [px(from / count) + 1.5, px(to / count) - 1.5];
      node(svg, "line", { x1: left, x2: right, y1: py(0) + 25, y2: py(0) + 25, class: "bracket" });
      if (7.2 * name.length < right - left)
        node(svg, "text", { x: (left + right) / 2, y: py(0) + 38, class: "tick middle" }, name);
    }
  }

  function byLayer(parent, options, count, { chosen, groups }) {
    const room = parent.clientWidth - margin.left - margin.right;
    const made = frame(replace(parent), {
      ...options, xName: "layer, in order of execution", xTicks: orderTicks(count, room),
      below: groups.length ? 20 : 0 });
    brackets(made, groups, count);
    const slot = made.inner.width / count;
    const mark = node(made.svg, "rect", {
      x: made.px(chosen / count), y: made.py(1), class: "chosen",
      width: slot, height: made.inner.height });
    if (slot < 3) mark.setAttribute("width", 3);
    return { ...made, slot, middle: (i) => made.px((i + 0.5) / count) };
  }

  // Numbers over more than two decades need a logarithmic axis to be told apart.
  function wide(values) {
    const positive = values.filter((value) => value > 0);
    return positive.length > 0 && Math.max(...positive) > 100 * Math.min(...positive);
  }

  // One quantity of each layer: bars from 0, or dots where the axis has no 0 to start from.
  function quantity(parent, { heading, kind, values, ...shown }) {
    const chosen = shown.chosen;
    const log = kind === "number" && wide(values);
    const y = (log ? logarithmic : linear)(values, kind);
    const made = byLayer(parent, {
      title: `${heading} by layer`, height: 250, y, yName: heading,
      about: `${values.length} layers; the table has every value.`,
    }, values.length, shown);
    const width = Math.max(1, Math.min(40, made.slot * 0.72));
    values.forEach((value, i) => {
      if (value === null) return;
      const top = made.py(y.at(value));
      const shade = i === chosen ? "data now" : "data";
      if (log)
        node(made.svg, "circle", {
          cx: made.middle(i), cy: top, class: shade,
          r: Math.max(2, Math.min(4.5, made.slot / 2)) });
      else
        node(made.svg, "rect", {
          x: made.middle(i) - width / 2, y: top, class: shade, width,
          height: Math.max(0, made.py(0) - top) });
    });
  }

  // The middle 80 % of the scores of each layer as a line, with the median as a dot.
  function spread(parent, { low, middle, high, ...shown }) {
    const y = logarithmic([...low, ...middle, ...high].filter((value) => value !== null), "log");
    const made = byLayer(parent, {
      title: "Scores by layer", height: 270, y,
      yName: "scores: the median, and from 10% to 90%",
      about: `Quantiles of the scores of ${low.length} layers; the table has every value.`,
    }, low.length, shown);
    low.forEach((value, i) => {
      if (value === null) return;
      const shade = i === shown.chosen ? " now" : "";
      const x = made.middle(i);
      node(made.svg, "line", {
        x1: x, x2: x, y1: made.py(y.at(value)), y2: made.py(y.at(high[i])), class: `range${shade}`,
        "stroke-width": Math.max(1.5, Math.min(8, made.slot * 0.4)) });
      node(made.svg, "circle", {
        cx: x, cy: made.py(y.at(middle[i])), class: `median${shade}`,
        r: Math.max(1.2, Math.min(4, made.slot * 0.3)) });
    });
  }

  // How many scores of one layer lie in each bin; those that are 0 stand apart, on the left.
  function histogram(parent, { name, edges, counts, zeros }) {
    replace(parent);
    const apart = zeros > 0 ? 0.1 : 0;
    const [low, high] = edges.length ? [edges[0], edges[edges.length - 1]] : [-1, 0];
    const x = (exponent) => apart + ((1 - apart) * (exponent - low)) / (high - low || 1);
    const y = linear([...counts, zeros], "count", 4);
    const room = Math.max(280, parent.clientWidth) - margin.left - margin.right;
    const step = Math.max(1, Math.ceil((high - low) / (room / 60)));
    const xTicks = zeros > 0 ? [{ at: apart * 0.4, text: "0" }] : [];
    if (edges.length)
      for (let e = Math.ceil(low - 1e-9); e <= high + 1e-9; e += step)
        xTicks.push({ at: x(e), text: power(e) });
    const total = counts.reduce((sum, count) => sum + count, zeros);
    const made = frame(parent, {
      title: `Scores in ${name}`, height: 240, y, xTicks,
      yName: "number of weights", xName: "share of the path mass",
      about: `${total} scores, of which ${zeros} are 0.`,
    });
    const bar = (from, to, count, shade) => {
      const [left, top] = [made.px(from), made.py(y.at(count))];
      const width = made.px(to) - left;
      node(made.svg, "rect", {
        x: left, y: top, class: shade, width: width > 4 ? width - 1 : width,
        height: made.py(0) - top });
    };
    if (zeros > 0) bar(0, apart * 0.8, zeros, "zeros");
    counts.forEach((count, i) => bar(x(edges[i]), x(edges[i + 1]), count, "data"));
  }

  // What is lost at most against what is pruned, with a dot at the chosen point.
  function curve(parent, { points, log, chosen, title, norm }) {
    const bounds = points.map(([, bound]) => bound);
    // The smallest scores are next to nothing: below a millionth the axis would show little else.
    const y = log ? logarithmic(bounds, "part", 1e-6) : linear(bounds, "part");
    const most = Math.max(3, Math.min(10, parent.clientWidth / 80));
    const x = linear(points.map(([pruned]) => pruned), "part", most);
    const made = frame(replace(parent), {
      title, height: 320, y,
      yName: `${norm} lost, at most`, xName: "weights pruned",
      xTicks: x.ticks, about: "The slider and the table below have every value.",
    });
    const places = points.map(([pruned, bound]) => [made.px(x.at(pruned)), made.py(y.at(bound))]);
    const [cx, cy] = places[chosen];
    const path = places.map((place) => place.join(",")).join(" ");
    node(made.svg, "polyline", { points: path, class: "line" });
    node(made.svg, "line", { x1: cx, x2: cx, y1: made.py(0), y2: cy, class: "range now" });
    node(made.svg, "circle", { cx, cy, r: 5, class: "data now" });
  }

  // The layer below a place of a chart by layer.
  function layerAt(parent, event, count) {
    const box = parent.getBoundingClientRect();
    const room = box.width - margin.left - margin.right;
    const part = (event.clientX - box.left - margin.left) / room;
    return part < 0 || part >= 1 ? null : Math.floor(part * count);
  }

  return { quantity, spread, histogram, curve, layerAt, wide };
})();
