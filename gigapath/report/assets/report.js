// The page of a report. Everything it shows comes from the JSON in #data; text is set as text, never as markup.
"use strict";
(async () => {
  if (!("DecompressionStream" in window)) {
    document.getElementById("main").append("This page needs a browser of 2023 or later.");
    return;
  }
  const packed = Uint8Array.from(atob(document.getElementById("data").textContent), (letter) => letter.charCodeAt(0));
  const data = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  const slides = data.slides;
  const main = document.getElementById("main");
  const words = { done: "done", no_tissue: "no tissue", failed: "failed", stopped: "stopped", todo: "to do" };
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const palette = [dark ? "#3d94d6" : "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00"];
  const other = "#8b93a1";
  const cividis = ["#00224e", "#2a3f6d", "#575d6d", "#7d7c78", "#a59c74", "#d3c164", "#fee838"];
  // What slides.csv says of every slide; other columns are the user's own, and stand in the table.
  const known = new Set([
    "seconds", "tiles/s", "seconds_tile", "seconds_embed", "seconds_slide_embed", "vendor", "scanner", "width", "height",
    "objective_power", "mpp_x", "mpp_y", "mpp_source", "level", "read_width", "read_height", "tile_size", "mpp",
    "tissue_method", "tissue_threshold", "tissue_pieces", "tile_encoder", "slide_encoder", "precision", "device",
    "trained", "file_sha256", "reader", "filter", "transform",
  ]);
  const inWords = {
    seconds: "time, seconds", seconds_tile: "tiling, seconds", seconds_embed: "tile encoder, seconds",
    seconds_slide_embed: "slide encoder, seconds", "tiles/s": "tiles a second", width: "width, pixels", height: "height, pixels",
    objective_power: "objective, times", mpp_x: "microns a pixel, x", mpp_y: "microns a pixel, y", mpp_source: "scale stated by",
    level: "level read", read_width: "read for a tile, pixels in x", read_height: "read for a tile, pixels in y",
    tile_size: "side of a tile, pixels", mpp: "microns a pixel of tiles", tissue_area_mm2: "tissue, mm²",
  };

  // ------------------------------------------------------------------------------------------------------ small parts

  /** An element with properties, or attributes where the name has a dash or is no property, and children. */
  function el(tag, given = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(given)) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "class") node.className = value;
      else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name in node && !name.includes("-")) node[name] = value;
      else node.setAttribute(name, value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
    return node;
  }

  function svg(tag, given = {}, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(given)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined) node.setAttribute(name, value);
    }
    node.append(...children.flat());
    return node;
  }

  const icons = {
    in: "M8 3v10M3 8h10", out: "M3 8h10", home: "M3 6V3h3M10 3h3v3M13 10v3h-3M6 13H3v-3", previous: "M10 3 5 8l5 5", next: "M6 3l5 5-5 5",
    close: "M4 4l8 8M12 4l-8 8",
  };
  const icon = (name) => svg("svg", { class: "icon", viewBox: "0 0 16 16", "aria-hidden": "true" }, svg("path", { d: icons[name] }));

  const whole = new Intl.NumberFormat("en");
  function shown(value) {
    if (value === null || value === undefined) return "";
    if (typeof value === "boolean") return value ? "yes" : "no";
    if (typeof value !== "number") return String(value);
    if (Number.isInteger(value)) return whole.format(value);
    return String(Number(value.toPrecision(4)));
  }
  const tissue = (value) => (typeof value === "number" && value ? (value >= 0.1 ? value.toFixed(2) : value.toPrecision(2)) : shown(value)); // mm²
  /** Words as nodes: an option such as --slide-mpp is never broken at its dashes. */
  const wording = (text) => text.split(/(--[a-z][\w-]*)/).filter(Boolean)
    .map((part) => (part.startsWith("--") ? el("span", { class: "option" }, part) : part));
  const plural = (count, word) => `${whole.format(count)} ${word}${count === 1 ? "" : "s"}`;
  const spaced = (name) => name.replaceAll("_", " ");
  /** A column of slides.csv with its unit. */
  const named = (name) => inWords[name] || (name.startsWith("dropped_") ? `tiles left out: ${spaced(name.slice(8))}` : spaced(name));
  const address = (entry, file) =>
    data.files ? data.files[`${entry.folder}/${file}`] : `report_files/${encodeURIComponent(entry.folder)}/${file}`;

  /** Pictures get their address when they come into view, and not before. */
  const inView = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      inView.unobserve(target);
      target.src = target.dataset.src;
    }
  });

  addEventListener("beforeprint", () => {
    for (const image of document.querySelectorAll("img[data-src]:not([src])")) {
      image.loading = "eager";
      image.src = image.dataset.src;
    }
  });

  function thumbnail(index) {
    const entry = data.media[index];
    const box = el("div", { class: "thumb" });
    const none = (why) => {
      box.replaceChildren(why);
      box.classList.add("none");
    };
    if (!entry || !entry.thumbnail) {
      none(slides.status[index] === "done" ? "no picture" : words[slides.status[index]]);
      return box;
    }
    const image = el("img", { alt: "", loading: "lazy", decoding: "async", onerror: () => none("picture missing") });
    image.dataset.src = address(entry, entry.thumbnail.file);
    inView.observe(image);
    box.append(image);
    return box;
  }

  /** A time of a record, such as 2026-11-23T16:29:14+00:00, as people write it. */
  const moment = (text) => String(text || "").replace(/^(\S{10})T(\d\d:\d\d).*(\+00:00|Z)$/, "$1 $2 UTC");

  const status = (state) => el("span", { class: `status ${state}` }, el("span", { class: `dot ${state}` }), words[state]);

  /** A card with a heading; beneath it what it says, and at the right its controls. */
  function section(title, { said = null, controls = null }, ...children) {
    const name = `s${document.querySelectorAll("main > section").length}`;
    const node = el("section", { class: "card", "aria-labelledby": name },
      el("div", { class: "card-head" }, el("div", {}, el("h2", { id: name }, title), said), controls), ...children);
    main.append(node);
    return node;
  }

  const indexOf = new Map(slides ? slides.ids.map((id, index) => [id, index]) : []);
  const slideLink = (id) =>
    indexOf.has(id)
      ? el("button", { type: "button", class: "link", onclick: () => openSlide(indexOf.get(id)) }, id)
      : document.createTextNode(id);

  // ------------------------------------------------------------------------------------------------- head, counts, why

  const filter = { status: null, text: "" };

  function drawHead() {
    const parts = [`made ${data.made}`, `gigapath ${data.version}`];
    if (data.encoder) parts.push(`tile embeddings: ${data.encoder}`);
    document.getElementById("meta").textContent = parts.join(" · ");
    for (const note of data.notes) main.append(el("p", { class: "notice" }, wording(note)));
  }

  function drawCounts() {
    const group = el("div", { class: "counts", role: "group", "aria-label": "Slides by status" });
    const buttons = [];
    const button = (state, word, count) => {
      const node = el(
        "button",
        {
          type: "button", class: "count", "aria-pressed": String(state === filter.status), disabled: count === 0,
          onclick: () => {
            filter.status = state;
            buttons.forEach((each) => each.setAttribute("aria-pressed", String(each === node)));
            updateTable();
          },
        },
        el("b", {}, whole.format(count)),
        el("span", {}, state ? el("span", { class: `dot ${state}` }) : null, word),
      );
      buttons.push(node);
      return node;
    };
    group.append(button(null, slides.ids.length === 1 ? "slide" : "slides", slides.ids.length));
    for (const [state, word] of Object.entries(words)) group.append(button(state, word, data.counts[state]));
    main.append(group);
  }

  function drawFailures() {
    if (!data.failures.length) return;
    const list = el("ul", { class: "failures" });
    for (const { reason, slides: ids } of data.failures) {
      const few = ids.slice(0, 8).map(slideLink);
      list.append(
        el("li", {}, el("strong", {}, plural(ids.length, "slide")), ": ", wording(reason),
          el("div", { class: "who" }, few, ids.length > 8 ? `and ${whole.format(ids.length - 8)} more` : null)),
      );
    }
    section("What went wrong", {}, list);
  }

  // ------------------------------------------------------------------------------------------------- the table of slides

  const PAGE = 200; // rows put into the page at once; search and sorting see all
  const table = { order: [], rows: new Map(), limit: PAGE, column: null, down: false };

  /** How many tiles; nothing where the slide never came so far as to have any. */
  const tilesOf = (row) => (slides.tiles[row] || ["done", "no_tissue"].includes(slides.status[row]) ? slides.tiles[row] : null);

  function tableColumns() {
    const column = (name) => slides.columns.indexOf(name);
    const get = (index) => (row) => slides.values[row][index];
    const columns = [
      { name: "slide", get: (row) => slides.ids[row] },
      { name: "status", get: (row) => words[slides.status[row]] },
      { name: "tiles", get: tilesOf, number: true },
    ];
    if (column("tissue_area_mm2") >= 0) {
      columns.push({ name: "tissue, mm²", get: get(column("tissue_area_mm2")), number: true, said: tissue });
    }
    const own = slides.columns
      .map((name, index) => ({ name: spaced(name), raw: name, get: get(index) }))
      .filter(({ raw }) => !known.has(raw) && raw !== "tissue_area_mm2" && !raw.startsWith("dropped_"));
    const longest = (text) => String(text ?? "").split(/[\s-]+/).reduce((most, word) => Math.max(most, word.length), 0);
    for (const column of own) { // wide enough for its words, of which only very long ones are broken
      column.least = Math.min(14, slides.ids.reduce((most, _, row) => Math.max(most, longest(shown(column.get(row)))), 0));
    }
    return [...columns, ...own.slice(0, 5)];
  }

  function drawTable() {
    const columns = tableColumns();
    const search = el("input", {
      type: "search", placeholder: "id, reason, any column", autocomplete: "off",
      oninput: () => {
        filter.text = search.value.trim().toLowerCase();
        updateTable();
      },
    });
    const said = el("p", { class: "note", role: "status" });
    const sortBy = (index, down) => {
      table.column = index;
      table.down = down;
      heads.forEach((head, each) =>
        head.setAttribute("aria-sort", each === index ? (down ? "descending" : "ascending") : "none"));
      choice.value = String(index);
      updateTable();
    };
    const heads = columns.map((column, index) =>
      el("th", { scope: "col", "aria-sort": "none", class: column.number ? "number" : null },
        el("button", { type: "button", onclick: () => sortBy(index, table.column === index && !table.down) }, column.name)));
    const choice = el("select", { onchange: () => sortBy(Number(choice.value), false) },
      columns.map((column, index) => el("option", { value: String(index) }, column.name)));
    const body = el("tbody");
    const more = el("button", { type: "button", class: "button more", onclick: () => { table.limit += 5 * PAGE; updateTable(false); } });
    const controls = el("div", { class: "controls" },
      el("label", { class: "field only-phone" }, "Sort by", choice), el("label", { class: "field" }, "Search", search));
    const node = section("Slides", { said, controls },
      el("div", { class: "scroll" },
        el("table", {}, el("caption", { class: "sr" }, "Slides, sortable by column"),
          el("thead", {}, el("tr", {}, el("th", { scope: "col" }, el("span", { class: "sr" }, "picture")), heads)), body)),
      more);
    node.classList.add("slides");
    Object.assign(table, { columns, body, said, more });
    table.text = slides.ids.map((id, row) =>
      [id, words[slides.status[row]], slides.errors[row], ...slides.warnings[row], ...slides.values[row]]
        .filter((value) => value !== null).join("\n").toLowerCase());
    sortBy(0, false);
  }

  function tableRow(row) {
    if (table.rows.has(row)) return table.rows.get(row);
    const [, , ...rest] = table.columns;
    const why = slides.errors[row] || slides.warnings[row].join(" ");
    const node = el("tr", { onclick: (event) => { if (!event.target.closest("button")) openSlide(row); } },
      el("td", { class: "thumb-cell" }, thumbnail(row)),
      el("td", {}, slideLink(slides.ids[row]), why ? el("div", { class: "why" }, wording(why)) : null),
      el("td", { class: "status-cell" }, status(slides.status[row])),
      rest.map((column) => {
        const value = (column.said || shown)(column.get(row));
        return el("td", { class: column.number ? "number" : null, "data-name": value === "" ? null : column.name, style: column.least ? `min-width: calc(${column.least + 1}ch + 24px)` : null }, value);
      }));
    table.rows.set(row, node);
    return node;
  }

  const collator = new Intl.Collator("en", { numeric: true }); // much quicker than localeCompare, over thousands of rows

  function compare(a, b) {
    if (a === null || a === undefined || a === "") return b === null || b === undefined || b === "" ? 0 : 1;
    if (b === null || b === undefined || b === "") return -1;
    const x = Number(a), y = Number(b);
    if (!Number.isNaN(x) && !Number.isNaN(y)) return table.down ? y - x : x - y;
    const order = collator.compare(String(a), String(b));
    return table.down ? -order : order;
  }

  /** Show the rows that fit the filter, in order; from the first ones again unless told otherwise. */
  function updateTable(anew = true) {
    if (anew) table.limit = PAGE;
    const get = table.columns[table.column].get;
    const order = slides.ids.map((_, row) => row)
      .filter((row) => (!filter.status || slides.status[row] === filter.status) && table.text[row].includes(filter.text));
    order.sort((a, b) => compare(get(a), get(b)) || a - b);
    table.order = order;
    table.body.replaceChildren(...order.slice(0, table.limit).map(tableRow));
    const all = slides.ids.length;
    table.said.textContent = order.length === all
      ? plural(all, "slide") : `${whole.format(order.length)} of ${plural(all, "slide")}`;
    table.more.hidden = order.length <= table.limit;
    table.more.textContent = `Show more (${whole.format(order.length - table.limit)} left)`;
  }

  // --------------------------------------------------------------------------------------------------- the map of slides

  const mixed = (from, to, share) =>
    [1, 3, 5].map((at) => Math.round(parseInt(from.slice(at, at + 2), 16) * (1 - share) + parseInt(to.slice(at, at + 2), 16) * share));
  function ramp(stops, share) {
    const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    return `rgb(${mixed(stops[low], stops[low + 1], place - low).join(" ")})`;
  }
  const rampBar = (stops, low, high) =>
    el("div", { class: "ramp-row" }, shown(low),
      el("span", { class: "ramp", style: `background: linear-gradient(90deg, ${stops.join(", ")})` }), shown(high));

  /** How a column becomes colors: by number where all are numbers and there are many, else by value. */
  function coloring(values) {
    const held = values.filter((value) => value !== null && value !== "");
    const numbers = held.map(Number);
    const kinds = [...new Set(held.map(String))];
    if (numbers.every((value) => Number.isFinite(value)) && kinds.length > 7) {
      const low = numbers.reduce((a, b) => Math.min(a, b)), high = numbers.reduce((a, b) => Math.max(a, b));
      return {
        of: (value) => (value === null || value === "" ? other : ramp(cividis, (Number(value) - low) / (high - low || 1))),
        legend: rampBar(cividis, low, high),
      };
    }
    const count = new Map();
    for (const value of held) count.set(String(value), (count.get(String(value)) || 0) + 1);
    kinds.sort((a, b) => (kinds.length > palette.length ? count.get(b) - count.get(a) : collator.compare(a, b)));
    const named = new Map(kinds.slice(0, palette.length).map((kind, index) => [kind, palette[index]]));
    const items = [...named].map(([name, color]) => ({ name, color, holds: (value) => String(value) === name, count: count.get(name) }));
    const rest = values.filter((value) => value === null || value === "" || !named.has(String(value))).length;
    if (rest) {
      const holds = (value) => value === null || value === "" || !named.has(String(value));
      items.push({ name: kinds.length > palette.length ? "other" : "not stated", color: other, holds, count: rest });
    }
    return { of: (value) => (value === null ? other : named.get(String(value)) || other), items };
  }

  function drawPlot() {
    if (!data.projections.length) return;
    const columns = new Map([["status", slides.status.map((state) => words[state])], ["tiles", slides.tiles]]);
    slides.columns.forEach((name, index) => columns.set(name, slides.values.map((row) => row[index])));
    for (const [name, values] of columns) {
      const kinds = new Set(values.filter((value) => value !== null));
      if (kinds.size < 2 && name !== "status") columns.delete(name);
    }
    const own = [...columns.keys()].filter((name) =>
      !known.has(name) && !["status", "tiles", "tissue_area_mm2"].includes(name) && !name.startsWith("dropped_"));
    // The first look is at labels, or at a column of the user's with few values: sites say more than a thousand patients.
    const first = own.find((name) => name.endsWith("label"))
      || own.find((name) => new Set(columns.get(name)).size <= palette.length + 1) || "tiles";
    const color = el("select", { onchange: () => draw() },
      [...columns.keys()].map((name) => el("option", { value: name, selected: name === first }, named(name))));
    const which = el("select", { onchange: () => draw() },
      data.projections.map((each, index) => el("option", { value: String(index) }, `${each.name}, ${each.embedding}`)));
    const plot = el("div", { class: "plot" });
    const legend = el("div", { class: "legend" });
    const caption = el("p", { class: "note" });
    const controls = el("div", { class: "controls" },
      data.projections.length > 1 ? el("label", { class: "field" }, "Embedding", which) : null,
      el("label", { class: "field" }, "Color", color));
    section("Slides by their embeddings", { said: caption, controls }, plot, legend);
    let chosen = null;

    function draw() {
      const projection = data.projections[Number(which.value) || 0];
      const rows = projection.ids.map((id) => indexOf.get(id));
      const values = columns.get(color.value);
      const colors = coloring(rows.map((row) => (row === undefined ? null : values[row])));
      const narrow = plot.clientWidth < 560;
      const width = narrow ? 420 : 960, height = narrow ? 400 : 470, edge = 26, left = 46;
      const extent = [0, 1].map((axis) => {
        const all = projection.points.map((point) => point[axis]);
        const low = all.reduce((a, b) => Math.min(a, b)), high = all.reduce((a, b) => Math.max(a, b));
        return [low, high - low || 1];
      });
      const at = projection.points.map((point) => [
        left + ((point[0] - extent[0][0]) / extent[0][1]) * (width - left - edge),
        height - edge - 14 - ((point[1] - extent[1][0]) / extent[1][1]) * (height - 2 * edge - 14),
      ]);
      const radius = rows.length > 800 ? 4 : rows.length > 150 ? 5.5 : 7;
      const points = at.map(([x, y], index) => {
        const value = rows[index] === undefined ? null : values[rows[index]];
        return svg("circle", {
          class: "point", cx: x, cy: y, r: radius, fill: colors.of(value),
          onpointerenter: (event) => { if (event.pointerType === "mouse") select(index, false); },
          onclick: (event) => (event.pointerType === "mouse" ? open(index) : select(index, true)),
        });
      });
      const ring = svg("circle", { class: "ring", r: radius + 3.5, visibility: "hidden" });
      const tip = el("div", { class: "plot-tip", hidden: true });
      const label = `${plural(rows.length, "slide")} as points, ${projection.method}; arrow keys go from slide to slide, Enter opens one`;
      const picture = svg("svg", {
        viewBox: `0 0 ${width} ${height}`, tabindex: "0", role: "application", "aria-label": label,
        onkeydown: keys, onpointerleave: () => select(null), onblur: () => select(null),
      },
        points, ring,
        svg("text", { x: width / 2, y: height - 9, "text-anchor": "middle" }, projection.axes[0]),
        svg("text", { x: 15, y: height / 2, "text-anchor": "middle", transform: `rotate(-90 15 ${height / 2})` }, projection.axes[1]));
      plot.replaceChildren(picture, tip, el("p", { class: "sr", "aria-live": "polite" }));
      const untrained = projection.trained ? "" : " The slide encoder's weights are random: the picture means nothing.";
      const far = projection.method === "PCA" ? "" : ", while the distance between groups means little";
      caption.textContent = `${plural(rows.length, "slide")}, one point each: alike in their embeddings where they lie close together${far}. `
        + `Embedding ${projection.embedding} of ${projection.name}; ${projection.method}.${untrained}`;
      drawLegend(colors, points, rows, values);

      function open(index) {
        if (rows[index] !== undefined) openSlide(rows[index]);
      }
      function select(index, touched = false) {
        chosen = index;
        ring.setAttribute("visibility", index === null ? "hidden" : "visible");
        tip.hidden = index === null;
        if (index === null) return;
        ring.setAttribute("cx", at[index][0]);
        ring.setAttribute("cy", at[index][1]);
        const row = rows[index];
        const value = row === undefined ? null : values[row];
        const text = `${named(color.value)}: ${value === null ? "not stated" : shown(value)}`;
        tip.replaceChildren(row === undefined ? "" : thumbnail(row), el("strong", {}, projection.ids[index]), el("div", {}, text),
          touched ? el("button", { type: "button", class: "button", onclick: () => open(index) }, "Open") : "");
        plot.lastChild.textContent = `${projection.ids[index]}, ${text}`;
        const scale = plot.clientWidth / width;
        const [x, y] = at[index].map((value) => value * scale);
        const aside = x + 16 + 190 > plot.clientWidth ? x - 16 - 190 : x + 16;
        tip.style.left = `${Math.max(0, Math.min(aside, plot.clientWidth - 190))}px`;
        tip.style.top = `${Math.max(0, Math.min(y - 40, plot.clientHeight - tip.offsetHeight))}px`;
      }
      function keys(event) {
        if (event.key === "Escape") return select(null);
        if (event.key === "Enter" && chosen !== null) return open(chosen);
        const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
        if (!step) return;
        event.preventDefault();
        if (chosen === null) return select(0);
        // The nearest point on that side, going aside counting twice.
        let best = null, least = Infinity;
        at.forEach(([x, y], index) => {
          const along = (x - at[chosen][0]) * step[0] + (y - at[chosen][1]) * step[1];
          const aside = Math.abs((x - at[chosen][0]) * step[1]) + Math.abs((y - at[chosen][1]) * step[0]);
          if (index !== chosen && along > 0.01 && along + 2 * aside < least) [best, least] = [index, along + 2 * aside];
        });
        if (best !== null) select(best);
      }
    }

    function drawLegend(colors, points, rows, values) {
      legend.replaceChildren(colors.legend || "");
      const buttons = (colors.items || []).map((item) => {
        const node = el("button", { type: "button", "aria-pressed": "false", title: "show these alone", onclick: () => {
          const on = node.getAttribute("aria-pressed") !== "true";
          buttons.forEach((each) => each.setAttribute("aria-pressed", String(each === node && on)));
          points.forEach((point, index) => {
            const value = rows[index] === undefined ? null : values[rows[index]];
            point.classList.toggle("away", on && !item.holds(value));
          });
        } }, el("span", { class: "swatch", style: `background: ${item.color}` }), `${item.name} (${whole.format(item.count)})`);
        return node;
      });
      legend.append(...buttons);
    }
    draw();
    let width = plot.clientWidth;
    new ResizeObserver(() => {
      if ((plot.clientWidth < 560) !== (width < 560)) draw();
      width = plot.clientWidth;
    }).observe(plot);
  }

  // -------------------------------------------------------------------------------------------------------------- results

  const figure = (value) => (Math.abs(value) >= 100 ? shown(value) : value.toFixed(3));

  function scoreCell(cell, signed) {
    if (!cell) return el("td", { class: "number" }, "–");
    const sign = signed && cell.value > 0 ? "+" : "";
    const node = el("td", { class: "number" });
    const figures = [el("strong", {}, sign + figure(cell.value))];
    if (cell.sd !== null && cell.sd !== undefined) figures.push(` ± ${figure(cell.sd)}`);
    if (cell.low < cell.high) { // null and a width of zero are no interval
      const reach = signed ? [-0.5, 0.5] : [0, 1];
      const x = (value) => 4 + 82 * Math.min(Math.max((value - reach[0]) / (reach[1] - reach[0]), 0), 1);
      figures.push(el("span", { class: "note" }, ` ${figure(cell.low)} to ${figure(cell.high)}`));
      node.append(svg("svg", { class: "interval", viewBox: "0 0 90 12", "aria-hidden": "true" },
        svg("rect", { class: "all", x: 0, y: 4, width: 90, height: 4, rx: 2 }),
        svg("rect", { class: "span", x: x(cell.low) - 1, y: 2.5, width: x(cell.high) - x(cell.low) + 2, height: 7, rx: 2 }),
        svg("circle", { cx: x(cell.value), cy: 6, r: 2.6 })));
    }
    node.append(...figures);
    return node;
  }

  const blocks = {
    scores: (block) => [
      el("div", { class: "scroll" }, el("table", { class: block.columns.length > 3 ? "dense" : null },
        el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "score"), block.columns.map((name) => el("th", { scope: "col", class: "number" }, name)))),
        el("tbody", {}, block.rows.map(([name, ...cells]) => el("tr", {}, el("th", { scope: "row" }, name), cells.map((cell) => scoreCell(cell, block.signed || cell?.signed))))))),
      block.intervals ? el("p", { class: "note" }, `Intervals: ${block.intervals}`.replace("Intervals: ±", "±")) : null,
    ],
    confusion: (block) => [
      el("div", { class: "scroll" }, el("table", {},
        el("caption", { class: "sr" }, "Rows: true class; columns: predicted class"),
        el("thead", {},
          el("tr", {}, el("th"), el("th", { colSpan: block.classes.length, scope: "colgroup" }, "predicted class")),
          el("tr", {}, el("th", { scope: "col" }, "true class"), block.classes.map((name) => el("th", { scope: "col" }, name)))),
        el("tbody", {}, block.counts.map((row, index) => {
          const all = row.reduce((a, b) => a + b, 0) || 1;
          return el("tr", {}, el("th", { scope: "row" }, block.classes[index]), row.map((count) => {
            const share = count / all;
            const style = `background: ${ramp(cividis, share)}; color: ${share > 0.55 ? "#111" : "#fff"}`;
            return el("td", { style }, whole.format(count), el("small", {}, `${Math.round(100 * share)} %`));
          }));
        })))),
      el("p", { class: "note" }, "Shade and per cent: share of the true class."),
    ],
    curves: (block) => block.panels.map((panel) => curves(block, panel)),
    predictions: (block) => [
      block.note ? el("p", { class: "note" }, block.note) : null,
      predictions(block),
    ],
    group: (block) => el("details", { class: "fold" }, el("summary", {}, block.title), blockGrid(block.blocks)),
    picture: (block) => el("img", { src: block.src, alt: block.title, style: "max-width: 100%" }),
    notes: (block) => block.sentences.map((sentence) => el("p", { class: "note" }, sentence)),
  };

  /** Round steps that cut a range into about five. */
  function ticks(low, high) {
    const rough = (high - low || 1) / 5;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((digit) => digit * power).find((each) => each >= rough);
    const found = [];
    for (let value = (Math.ceil(low / step - 1e-9) || 0) * step; /* no -0 */ value <= high + step * 1e-6; value += step) found.push(value);
    return found;
  }

  const dashes = [null, "7 4", "2 3"]; // of lines, so that they differ without color too

  function curves(block, panel) {
    const width = 560, height = 250, left = 60, right = 14, top = 12, bottom = 44;
    const scaled = (value) => (block.log ? Math.log10(value) : value);
    const xs = panel.lines.flatMap((line) => line.x.map(scaled)), ys = panel.lines.flatMap((line) => line.y);
    const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const pad = (y1 - y0 || Math.abs(y1) || 1) * 0.06;
    const x = (value) => left + ((scaled(value) - x0) / (x1 - x0 || 1)) * (width - left - right);
    const y = (value) => height - bottom - ((value - y0 + pad) / (y1 - y0 + 2 * pad)) * (height - top - bottom);
    const upwards = ticks(y0, y1);
    const digits = upwards.length > 1 ? Math.max(0, -Math.floor(Math.log10(upwards[1] - upwards[0]) + 1e-9)) : 3; // all alike
    const across = block.log ? [] : ticks(x0, x1).filter((value) => block.x !== "epoch" || Number.isInteger(value));
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${panel.y} over ${block.x}` },
      upwards.map((value) => [
        svg("line", { class: "axis", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
        svg("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(digits))]).flat(),
      (block.log ? [10 ** x0, 10 ** x1] : across).map((value) =>
        svg("text", { x: x(value), y: height - bottom + 18, "text-anchor": "middle" }, shown(value))),
      svg("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, block.x),
      block.mark ? svg("line", { class: "axis", "stroke-dasharray": "4 3", x1: x(block.mark.x), x2: x(block.mark.x), y1: top, y2: height - bottom }) : [],
      panel.lines.map((line, index) => {
        const points = line.x.map((value, at) => [x(value), y(line.y[at])]);
        return [
          svg("path", { d: "M" + points.map((point) => point.join(" ")).join("L"), stroke: palette[index % palette.length], "stroke-dasharray": dashes[index % 3] }),
          points.length < 30 ? points.map(([cx, cy]) => svg("circle", { cx, cy, r: 3, fill: palette[index % palette.length] })) : []].flat();
      }).flat());
    const key = el("div", { class: "legend" }, panel.lines.map((line, index) =>
      el("span", { class: "status" }, svg("svg", { class: "line-key", viewBox: "0 0 28 8", "aria-hidden": "true" },
        svg("path", { d: "M0 4H28", stroke: palette[index % palette.length], "stroke-dasharray": dashes[index % 3] })), line.name)),
      block.mark ? el("span", { class: "note" }, `dashed: ${block.mark.words}`) : null);
    return el("div", { class: "curves" }, el("p", { class: "note" }, panel.y), picture, key);
  }

  const FIRST = 15; // predictions that are shown at once

  function predictions(block) {
    const numbers = block.columns.map((name) => name.startsWith("p_"));
    const truth = block.columns.indexOf("label"), said = block.columns.indexOf("predicted");
    const body = el("tbody");
    const draw = (rows) => body.replaceChildren(...rows.map((row) =>
      el("tr", {}, row.map((cell, index) => {
        const wrong = index === said && truth >= 0 && cell !== row[truth];
        return el("td", { class: numbers[index] ? "number" : null },
          index === 0 && block.of_slides ? slideLink(cell) : numbers[index] && cell !== "" ? Number(cell).toFixed(3) : cell,
          wrong ? el("span", { class: "wrong" }, "≠ label") : null);
      }))));
    draw(block.rows.slice(0, FIRST));
    const more = el("button", { type: "button", class: "button more", hidden: block.rows.length <= FIRST, onclick: () => { draw(block.rows); more.hidden = true; } },
      `Show all ${whole.format(block.rows.length)}`);
    return el("div", {}, el("div", { class: "scroll" }, el("table", {},
      el("thead", {}, el("tr", {}, block.columns.map((name, index) =>
        el("th", { scope: "col", class: numbers[index] ? "number" : null }, name.startsWith("p_") ? `p(${name.slice(2)})` : spaced(name))))),
      body)), more);
  }

  function blockGrid(list) {
    return el("div", { class: "blocks" }, list.map((block) =>
      el("div", { class: `block ${block.kind}` }, block.title && block.kind !== "group" ? el("h3", {}, block.title) : null, blocks[block.kind](block))));
  }

  function drawResults() {
    for (const result of data.results) {
      section(result.name ? `${result.title} (${result.name})` : result.title, {}, blockGrid(result.blocks));
    }
  }

  // -------------------------------------------------------------------------------------------------------------- a slide

  const dialog = document.getElementById("slide");
  let opened = null; // { row, viewer, close }

  function openSlide(row) {
    const from = opened ? opened.from : document.activeElement;
    if (opened) opened.close();
    opened = drawSlide(row, from);
    if (!dialog.open) dialog.showModal();
    history.replaceState(null, "", `#slide=${encodeURIComponent(slides.ids[row])}`);
    opened.start();
  }

  dialog.addEventListener("close", () => {
    if (!opened) return;
    const from = opened.from;
    opened.close();
    opened = null;
    dialog.replaceChildren();
    history.replaceState(null, "", location.pathname + location.search);
    if (from && from.isConnected) from.focus();
  });

  function drawSlide(row, from) {
    const entry = data.media[row] || { maps: [] };
    const order = table.order.includes(row) ? table.order : slides.ids.map((_, index) => index);
    const place = order.indexOf(row);
    const step = (by, word) => el("button", {
      type: "button", class: "button", disabled: !(place + by in order), "aria-label": `${word} slide`,
      onclick: () => openSlide(order[place + by]),
    }, icon(word), el("span", { class: "wide" }, word));
    const stage = el("div", { class: "stage" });
    const side = el("div", { class: "side", tabindex: "0", role: "region", "aria-label": "Layers, tiles and facts" });
    dialog.replaceChildren(el("div", { class: "slide" },
      el("header", { class: "slide-head" },
        el("div", { class: "grow" }, el("h2", { id: "slide-title" }, slides.ids[row]), status(slides.status[row]),
          el("span", { class: "note" }, slides.tiles[row] ? plural(slides.tiles[row], "tile") : "")),
        step(-1, "previous"), step(1, "next"),
        el("button", { type: "button", class: "button close", "aria-label": "close", onclick: () => dialog.close() },
          icon("close"), el("span", { class: "wide" }, "close"))),
      el("div", { class: "slide-body" }, stage, side)));
    const view = entry.levels ? slideViewer(entry, stage, side) : null;
    if (!view) {
      const why = slides.errors[row] || (slides.status[row] === "todo" ? "Nothing has been done for this slide yet." : "The slide's file could not be read, and it has no preview.");
      stage.append(el("div", { class: "empty" }, el("strong", {}, "No picture of this slide"), el("p", {}, wording(why))));
    }
    side.append(...facts(row, entry));
    return {
      row, from,
      start: () => (view ? view.start() : dialog.querySelector(".close").focus()),
      close: () => view && view.close(),
    };
  }

  function slideViewer(entry, stage, side) {
    const place = el("div", { class: "viewer" });
    const { frame, levels } = entry;
    const largest = levels[levels.length - 1];
    const ratio = largest.h / largest.w;
    // The slide is one unit wide in the viewer.
    const onPicture = (box) => new OpenSeadragon.Rect((box.x - frame.x) / frame.w, ((box.y - frame.y) / frame.h) * ratio, box.w / frame.w, (box.h / frame.h) * ratio);
    const marks = []; // elements over the picture, each with its place
    const onOpen = [];
    let viewer = null, shownMap = null, shownTiles = null;

    const bar = el("i");
    const barWords = el("span");
    stage.append(place, frame.mpp ? el("div", { class: "scale-bar" }, barWords, bar) : "");
    const zoomButton = (sign, label, act) =>
      el("button", { type: "button", class: "button", "aria-label": label, title: label, onclick: act }, icon(sign));
    stage.append(el("div", { class: "zoom" },
      zoomButton("in", "Zoom in", () => zoomBy(1.6)), zoomButton("out", "Zoom out", () => zoomBy(1 / 1.6)),
      zoomButton("home", "Whole slide", () => viewer.viewport.goHome())));

    function zoomBy(factor) {
      viewer.viewport.zoomBy(factor);
      viewer.viewport.applyConstraints();
    }

    const slider = (label, value, act) => {
      const said = el("output", {}, `${value} %`);
      const input = el("input", { type: "range", min: "0", max: "100", value: String(value), "aria-label": label, oninput: () => {
        said.textContent = `${input.value} %`;
        act(Number(input.value) / 100);
      } });
      return { node: el("div", { class: "slider" }, "opacity", input, said), value: () => Number(input.value) / 100 };
    };
    const addLayer = (layer, opacity, done) => viewer.addTiledImage({
      tileSource: { type: "legacy-image-pyramid", levels: [{ url: address(entry, layer.file), width: layer.pixels[0], height: layer.pixels[1] }] },
      x: onPicture(layer).x, y: onPicture(layer).y, width: onPicture(layer).width, opacity,
      success: ({ item }) => done(item),
    });

    // ---- layers
    const controls = el("section", { "aria-label": "Layers" }, el("h3", {}, "Layers"));
    if (entry.tiles) {
      const opacity = slider("Opacity of the tiles", entry.maps.length ? 0 : 60, (value) => shownTiles && shownTiles.setOpacity(value));
      controls.append(el("div", { class: "layer tiles-layer" }, el("span", {}, "Tiles"), opacity.node));
      onOpen.push(() => addLayer(entry.tiles, opacity.value(), (item) => { shownTiles = item; }));
    }
    if (entry.maps.length) {
      const opacity = slider("Opacity of the map", 50, (value) => shownMap && shownMap.setOpacity(value));
      const about = el("div", { class: "layer" });
      const choice = el("select", { "aria-label": "Map", onchange: () => showMap() },
        el("option", { value: "" }, "none"), entry.maps.map((map, index) =>
          el("option", { value: String(index), selected: index === 0 && !map.stale }, map.stale ? `out of date: ${map.title}` : map.title)));
      const showMap = () => {
        if (shownMap) viewer.world.removeItem(shownMap);
        shownMap = null;
        const map = entry.maps[Number(choice.value)];
        about.replaceChildren();
        if (choice.value === "" || !map) return;
        addLayer(map, opacity.value(), (item) => {
          if (shownMap) viewer.world.removeItem(shownMap);
          shownMap = item;
        });
        about.append(...mapLegend(map));
      };
      controls.append(el("div", { class: "layer map-layer" }, el("span", {}, "Map"), choice, opacity.node), about);
      onOpen.push(showMap);
    }
    if (entry.crops) {
      const check = el("input", { type: "checkbox", checked: true, onchange: () => {
        for (const mark of marks) mark.hidden = !check.checked;
      } });
      controls.append(el("label", { class: "check" }, check, "Mark typical and unusual tiles"));
    }
    if (controls.children.length > 1) side.append(controls);

    // ---- typical and unusual tiles
    if (entry.crops) {
      const { typical, unusual, file } = entry.crops;
      const count = typical.length + unusual.length;
      const group = (kind, list, first) => [
        el("h4", { style: `color: var(--${kind})` }, el("span", { class: "key" }), el("span", { style: "color: var(--ink)" }, kind === "typical" ? "Most typical" : "Most unusual")),
        el("div", { class: `crops ${kind}` }, list.map((tile, index) => crop(kind, tile, first + index)))];
      const crop = (kind, [x, y, w, h, distance], number) => {
        const mark = el("div", { class: `mark ${kind}` });
        mark.place = { x, y, w, h };
        marks.push(mark);
        const label = `${kind} tile at x ${x}, y ${y}, distance ${distance} of the median; show it on the slide`;
        const picture = file
          ? el("span", { class: "pixels" }, el("img", { alt: "", loading: "lazy", src: address(entry, file), style: `width: ${100 * count}%; left: ${-100 * number}%` }))
          : null;
        const node = el("button", { type: "button", class: "crop", "aria-label": label, "aria-pressed": "false", onclick: () => {
          dialog.querySelectorAll(".crop").forEach((each) => each.setAttribute("aria-pressed", String(each === node)));
          for (const each of marks) each.classList.toggle("current", each === mark);
          viewer.viewport.fitBounds(onPicture({ x: x - 2 * w, y: y - 2 * h, w: 5 * w, h: 5 * h }));
          stage.scrollIntoView({ block: "nearest" });
        } }, picture, el("span", { class: "figure" }, `${distance.toFixed(2)}×`));
        return node;
      };
      side.append(el("section", {}, el("h3", {}, "Tiles to look at"), group("typical", typical, 0),
        unusual.length ? group("unusual", unusual, typical.length) : null,
        el("p", { class: "note" }, data.tiles_method, file ? null : " The slide's file was not at hand, so their pixels are not shown.")));
    }

    function scale() {
      if (!frame.mpp || !viewer) return;
      const perPixel = frame.mpp * frame.w / (place.clientWidth * viewer.viewport.getZoom(true)); // microns
      const round = [1, 2, 5].flatMap((digit) => [0, 1, 2, 3, 4].map((power) => digit * 10 ** power)).sort((a, b) => a - b);
      const length = round.filter((each) => each / perPixel <= 130).pop() || 1;
      barWords.textContent = length >= 1000 ? `${length / 1000} mm` : `${length} µm`;
      bar.style.width = `${length / perPixel}px`;
    }

    return {
      start() {
        viewer = OpenSeadragon({
          element: place, drawer: "canvas", showNavigationControl: false, crossOriginPolicy: false, visibilityRatio: 0.6,
          minZoomImageRatio: 0.7, maxZoomPixelRatio: 4, animationTime: 0.5, springStiffness: 9, preserveImageSizeOnResize: true,
          gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
          tileSources: { type: "legacy-image-pyramid", levels: levels.map((level) => ({ url: address(entry, level.file), width: level.w, height: level.h })) },
        });
        viewer.canvas.setAttribute("role", "application");
        viewer.canvas.setAttribute("aria-label", "The slide: arrow keys move, plus and minus zoom, 0 shows all of it");
        viewer.addHandler("canvas-key", (event) => { // turning and mirroring a slide by a slip of a key helps nobody
          if (["r", "R", "f", "F"].includes(event.originalEvent.key)) event.preventDefaultAction = true;
        });
        viewer.addHandler("open", () => {
          for (const begin of onOpen) begin();
          for (const mark of marks) viewer.addOverlay({ element: mark, location: onPicture(mark.place) });
          scale();
        });
        viewer.addHandler("open-failed", () => missing());
        viewer.addHandler("tile-load-failed", (event) => { if (event.tiledImage === viewer.world.getItemAt(0)) missing(); });
        viewer.addHandler("update-viewport", scale);
        // Where a window changes in height alone, zoom and center stay, and OpenSeadragon 5 would draw tiles where they were.
        viewer.addHandler("after-resize", () => {
          for (let at = 0; at < viewer.world.getItemCount(); at += 1) viewer.world.getItemAt(at).setClip(null);
        });
        // Beneath a map the slide is gray and pale: its stain must not mix with the map's colors.
        viewer.addHandler("tiled-image-drawn", ({ tiledImage }) => {
          if (tiledImage !== viewer.world.getItemAt(0) || !shownMap || shownMap.getOpacity() === 0) return;
          const { context } = viewer.drawer, box = viewer.viewport.viewportToViewerElementRectangle(tiledImage.getBounds(true));
          const [left, top] = [box.x, box.y].map((edge) => Math.ceil(edge * OpenSeadragon.pixelDensityRatio)); // whole pixels
          const [right, bottom] = [box.x + box.width, box.y + box.height].map((edge) => Math.floor(edge * OpenSeadragon.pixelDensityRatio));
          context.save();
          for (const [how, shade] of [["saturation", "#808080"], ["source-over", "rgb(255 255 255 / 35%)"]]) {
            context.globalCompositeOperation = how;
            context.fillStyle = shade;
            context.fillRect(left, top, right - left, bottom - top);
          }
          context.restore();
        });
        // Tiles keep sharp edges when they are drawn larger.
        viewer.addHandler("tile-drawing", ({ tiledImage, context }) => {
          const larger = tiledImage.viewportToImageZoom(viewer.viewport.getZoom(true)) > 1;
          context.imageSmoothingEnabled = tiledImage === viewer.world.getItemAt(0) || !larger;
        });
        viewer.canvas.focus({ preventScroll: true });
        function missing() {
          if (!stage.querySelector(".empty")) stage.append(el("div", { class: "empty" }, el("strong", {}, "A picture of this slide is missing"), "Make the report again, and keep report_files beside the page."));
        }
      },
      close() {
        if (viewer) viewer.destroy();
        viewer = null;
      },
    };
  }

  function mapLegend(map) {
    const parts = [el("strong", { class: "map-title" }, map.title)]; // in full: the choice above may cut it
    if (map.stale) parts.push(el("p", { class: "alert" }, map.stale));
    if (map.legend && map.legend.stops) parts.push(rampBar(map.legend.stops, map.legend.low, map.legend.high));
    if (map.legend && map.legend.items) {
      parts.push(el("div", { class: "legend" }, map.legend.items.map((item) =>
        el("span", { class: "status" }, el("span", { class: "swatch", style: `background: ${item.colour}` }), item.tiles ? `${item.name}: ${whole.format(item.tiles)}` : item.name))));
    }
    if (map.legend && map.legend.label) parts.push(el("p", { class: "note" }, map.legend.label));
    parts.push(el("p", { class: "note" }, "Beneath a map the slide is gray; at opacity 0 its stain is seen."), factList(Object.entries(map.facts)));
    return parts;
  }

  const factList = (pairs) => el("dl", { class: "facts" },
    pairs.flatMap(([name, value]) => [el("dt", {}, named(name)), el("dd", {}, shown(value))]));

  function facts(row, entry) {
    const held = slides.columns.map((name, index) => [name, slides.values[row][index]]).filter(([, value]) => value !== null && value !== "");
    const parts = [];
    const said = [entry.levels ? slides.errors[row] : "", ...slides.warnings[row], entry.note].filter(Boolean); // an error stands in place of the picture
    if (said.length) parts.push(el("section", {}, el("h3", {}, "Notes"), said.map((text) => el("p", {}, wording(text)))));
    if (held.length) parts.push(el("section", {}, el("h3", {}, "Facts"), factList(held)));
    if (entry.levels) {
      parts.push(el("p", { class: "keys" }, "In the picture: ", el("kbd", {}, "arrows"), " move, ", el("kbd", {}, "+"), " ", el("kbd", {}, "−"), " zoom, ", el("kbd", {}, "0"), " whole slide; ", el("kbd", {}, "Esc"), " closes."));
    }
    return parts;
  }

  // ----------------------------------------------------------------------------------------------------------------- foot

  function drawFoot() {
    const foot = document.getElementById("terms");
    const [first, ...rest] = data.terms;
    foot.append(el("p", {}, el("strong", {}, first)), ...rest.map((text) => el("p", {}, text)));
    const pairs = (values) => Object.entries(values || {}).map(([name, value]) =>
      el("tr", {}, el("td", {}, name), el("td", {}, value !== null && typeof value === "object" ? JSON.stringify(value) : shown(value))));
    const named = (title, rows) => (rows.length ? [el("h3", {}, title), el("table", {}, el("tbody", {}, rows))] : []);
    for (const run of data.runs.slice(-10)) {
      foot.append(el("details", {},
        el("summary", {}, `gigapath ${run.verb}, ${moment(run.started)}: ${run.outcome || "not ended"}`),
        el("div", { class: "runs" }, el("pre", {}, (run.command || []).join(" ")),
          named("Options", pairs(run.options)), named("Versions", pairs(run.versions)), named("Found out", pairs(run.facts)))));
    }
    for (const result of data.results) {
      const options = Object.entries(result.options).flatMap(([name, value]) =>
        value !== null && typeof value === "object" && !Array.isArray(value) ? Object.entries(value) : [[name, value]]);
      if (options.length) foot.append(el("details", {}, el("summary", {}, `Options: ${result.title}`), el("div", { class: "runs" }, el("table", {}, el("tbody", {}, pairs(Object.fromEntries(options)))))));
    }
  }

  drawHead();
  if (slides) {
    drawCounts();
    drawFailures();
  }
  drawResults();
  if (slides) {
    drawPlot();
    drawTable();
    const asked = new URLSearchParams(location.hash.slice(1)).get("slide");
    if (asked !== null && indexOf.has(asked)) openSlide(indexOf.get(asked));
  }
  drawFoot();
})();
