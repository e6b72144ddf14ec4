"use strict";

(() => {
  const find = (id) => document.getElementById(id);
  const { columns, rows, histograms, curve, norm } = JSON.parse(find("data").textContent);
  const place = Object.fromEntries(columns.map((column, i) => [column.name, i]));
  const values = (name) => rows.map((row) => row[place[name]]);
  document.documentElement.classList.add("with-script");

  // Draws at once, and again whenever the width changes.
  function drawn(id, draw) {
    let width = 0;
    new ResizeObserver(([entry]) => {
      if (entry.contentRect.width === width) return;
      width = entry.contentRect.width;
      draw(find(id));
    }).observe(find(id));
    return () => find(id).clientWidth && draw(find(id));
  }

  // Neighbours in the same outermost module; none where that is nearly every layer by itself.
  function outer(names) {
    const groups = [];
    names.forEach((layer, i) => {
      const [name] = layer.split(".");
      if (groups.at(-1)?.name === name) groups.at(-1).to = i + 1;
      else groups.push({ name, from: i, to: i + 1 });
    });
    return groups.length > 1 && groups.length <= names.length / 2 ? groups : [];
  }

  function layers() {
    const lines = [...find("rows").tBodies[0].rows].sort((a, b) => a.dataset.row - b.dataset.row);
    const shown = (i, k) => lines[i].cells[k].textContent;
    const [chooseLayer, chooseQuantity] = [find("choose-layer"), find("choose-quantity")];
    const groups = outer(values("layer"));
    let chosen = 0;

    const drawQuantity = drawn("quantity", (parent) => {
      const { name, heading, kind } = columns[place[chooseQuantity.value]];
      charts.quantity(parent, { heading, kind, values: values(name), chosen, groups });
    });
    const drawSpread = drawn("spread", (parent) => {
      const [low, middle, high] = ["p10", "p50", "p90"].map(values);
      charts.spread(parent, { low, middle, high, chosen, groups });
    });
    const drawHistogram = drawn("histogram", (parent) => {
      charts.histogram(parent, { name: shown(chosen, 0), ...histograms[chosen] });
    });

    function say(i) {
      const k = place[chooseQuantity.value];
      const value = `${columns[k].heading} ${shown(i, k)}`;
      find("readout").textContent = `${i + 1}. ${shown(i, 0)}: ${value}`;
    }

    function pairs() {
      return columns.slice(1).map((column, i) => {
        const pair = document.createElement("div");
        const [term, value] = [document.createElement("dt"), document.createElement("dd")];
        term.textContent = column.heading;
        value.textContent = shown(chosen, i + 1);
        pair.append(term, value);
        return pair;
      });
    }

    function choose(i) {
      chosen = i;
      chooseLayer.value = String(i);
      find("previous").disabled = i === 0;
      find("next").disabled = i === rows.length - 1;
      find("layer-name").textContent = shown(i, 0);
      find("values").replaceChildren(...pairs());
      for (const line of lines) line.removeAttribute("aria-current");
      lines[i].setAttribute("aria-current", "true");
      say(i);
      drawQuantity();
      drawSpread();
      drawHistogram();
    }

    chooseLayer.addEventListener("change", () => choose(Number(chooseLayer.value)));
    chooseQuantity.addEventListener("change", () => (say(chosen), drawQuantity()));
    find("previous").addEventListener("click", () => choose(chosen - 1));
    find("next").addEventListener("click", () => choose(chosen + 1));
    document.addEventListener("click", (event) => {
      const link = event.target.closest("a[data-row]");
      if (link) choose(Number(link.dataset.row));
    });
    for (const id of ["quantity", "spread"]) {
      const chart = find(id);
      const at = (event) => charts.layerAt(chart, event, rows.length);
      chart.addEventListener("pointermove", (event) => say(at(event) ?? chosen));
      chart.addEventListener("pointerleave", () => say(chosen));
      chart.addEventListener("click", (event) => choose(at(event) ?? chosen));
    }
    choose(0);
  }

  function table() {
    const body = find("rows").tBodies[0];
    const lines = [...body.rows];
    const heads = [...find("rows").tHead.rows[0].cells];
    const texts = rows.map((row) =>
      row.filter((_, k) => columns[k].kind === "text").join(" ").toLowerCase());
    const collator = new Intl.Collator("en", { numeric: true });

    function tell() {
      const visible = lines.filter((line) => !line.hidden).length;
      const head = heads.find((cell) => cell.ariaSort !== "none");
      const sorted = head ? `, sorted by ${head.textContent}, ${head.ariaSort}` : "";
      find("count").textContent = `${visible} of ${lines.length} layers${sorted}`;
    }

    // Numbers begin with the largest; a third click brings back the order of execution.
    function sort(k) {
      const text = columns[k].kind === "text";
      const [first, second] = text ? ["ascending", "descending"] : ["descending", "ascending"];
      const next = { none: first, [first]: second, [second]: "none" }[heads[k].ariaSort];
      for (const head of heads) head.ariaSort = "none";
      heads[k].ariaSort = next;
      const order = lines.map((_, i) => i);
      if (next !== "none") {
        const sign = next === "ascending" ? 1 : -1;
        order.sort((i, j) => {
          const [a, b] = [rows[i][k], rows[j][k]];
          if (a === null || b === null) return (a === null) - (b === null);
          return sign * (text ? collator.compare(a, b) : a - b);
        });
      }
      body.append(...order.map((i) => lines[i]));
      tell();
    }

    heads.forEach((head, k) => head.firstElementChild.addEventListener("click", () => sort(k)));
    find("filter").addEventListener("input", () => {
      const words = find("filter").value.toLowerCase().split(/\s+/);
      lines.forEach((line, i) => (line.hidden = !words.every((word) => texts[i].includes(word))));
      tell();
    });
  }

  function modules() {
    const parts = document.querySelectorAll(".tree details");
    for (const [id, open] of [["open-all", true], ["close-all", false]])
      find(id)?.addEventListener("click", () => parts.forEach((part) => (part.open = open)));
  }

  function pruning() {
    const [axis, slider] = [find("logarithmic"), find("pruned")];
    const lines = find("curve-values").tBodies[0].rows;
    const draw = drawn("curve", (parent) => {
      const [title, chosen] = [find("pruning-heading").textContent, Number(slider.value)];
      charts.curve(parent, { points: curve, log: axis.checked, chosen, title, norm });
    });

    function say() {
      const [pruned, lost] = [...lines[slider.value].cells].map((cell) => cell.textContent);
      find("lost").textContent = `${pruned}: at most ${lost} of the ${norm} lost`;
      slider.setAttribute("aria-valuetext", find("lost").textContent);
      draw();
    }

    axis.checked = charts.wide(curve.map(([, bound]) => bound));
    slider.value = curve.findLastIndex(([, bound]) => bound <= 0.01);
    axis.addEventListener("change", draw);
    slider.addEventListener("input", say);
    say();
  }

  if (rows.length) {
    modules();
    layers();
    table();
  }
  if (curve.length) pruning();
})();
