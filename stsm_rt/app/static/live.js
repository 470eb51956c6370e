// The live half of the page: the camera's frames go out, what is recognized comes back (the protocol is in live.py).
// One frame is under way at a time. What the camera shows meanwhile is dropped and counted, so that nothing piles up.
(() => {
  "use strict";

  const LONGER_SIDE = 640; // pixels; the network sees less
  const JPEG_QUALITY = 0.85;
  const BARS = 5;
  const MOST_EVENTS = 50;
  const WINDOW = 2000; // milliseconds over which rates are counted
  const REFRESH = 400; // milliseconds between two looks at the numbers
  const HEADER_BYTES = 16;

  const words = (label) => label.replaceAll("_", " ");
  const percent = (score) => `${Math.round(100 * score)} %`;
  const clock = (seconds) => `${Math.floor(seconds / 60)}:${(seconds % 60).toFixed(1).padStart(4, "0")}`;
  const server = (path) => new URL(path, document.baseURI);

  class Refusal extends Error {}

  // Sends the frames of a video, the newest whenever the last one was answered.
  class Pump {
    // Times are in seconds since `begin` (milliseconds, of performance.now).
    constructor(video, socket, begin) {
      this.video = video;
      this.socket = socket;
      this.begin = begin;
      this.canvas = document.createElement("canvas");
      this.context = this.canvas.getContext("2d", { alpha: false, willReadFrequently: true });
      this.byFrame = "requestVideoFrameCallback" in video;
      this.waits = false; // for an answer
      this.sent = 0;
      this.ticks = 0;
      this.#ask();
    }

    stop() {
      this.stopped = true;
    }

    answered() {
      this.waits = false;
      return performance.now() - this.captured;
    }

    #ask() {
      const look = (now, about) => this.#look(now, about ?? {});
      if (this.byFrame) this.video.requestVideoFrameCallback(look);
      else setTimeout(() => look(performance.now()), 1000 / 30);
    }

    #look(now, about) {
      if (this.stopped) return;
      this.#ask();
      const presented = about.presentedFrames ?? ++this.ticks;
      this.first ??= presented;
      if (this.waits || !this.video.videoWidth || this.socket.readyState !== WebSocket.OPEN) return;
      this.waits = true;
      this.sent += 1;
      this.captured = Math.max(about.captureTime ?? now, this.captured ?? 0);
      const header = new DataView(new ArrayBuffer(HEADER_BYTES));
      header.setFloat64(0, (this.captured - this.begin) / 1000, true);
      header.setUint32(8, presented - this.first + 1 - this.sent, true);
      this.#draw();
      this.canvas.toBlob((jpeg) => this.#send(header, jpeg), "image/jpeg", JPEG_QUALITY);
    }

    // As the camera sees it: only the preview is a mirror.
    #draw() {
      const { videoWidth, videoHeight } = this.video;
      const scale = Math.min(1, LONGER_SIDE / Math.max(videoWidth, videoHeight));
      const [width, height] = [Math.round(videoWidth * scale), Math.round(videoHeight * scale)];
      if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
      this.context.drawImage(this.video, 0, 0, width, height);
    }

    #send(header, jpeg) {
      if (this.stopped || this.socket.readyState !== WebSocket.OPEN) return;
      this.socket.send(new Blob([header, jpeg]));
    }
  }

  // Counts what happened in the last two seconds.
  class Rate {
    times = [];

    count(now) {
      this.times.push(now);
    }

    perSecond(now) {
      while (this.times.length && this.times[0] < now - WINDOW) this.times.shift();
      const begin = this.times[0];
      return this.times.length > 1 ? ((this.times.length - 1) * 1000) / Math.max(now - begin, 1) : 0;
    }
  }

  async function openCamera() {
    if (!window.isSecureContext)
      throw new Refusal(
        "Browsers open the camera only for pages over HTTPS or from this very machine: use an https:// address."
      );
    if (!navigator.mediaDevices?.getUserMedia) throw new Refusal("This browser gives pages no camera: use another one.");
    try {
      return await navigator.mediaDevices.getUserMedia({
        audio: false,
        video: { width: { ideal: 640 }, height: { ideal: 360 }, frameRate: { ideal: 30 }, facingMode: "user" },
      });
    } catch (error) {
      const sentences = {
        NotAllowedError: "Camera refused: allow it for this page, beside the address above, and press Start again.",
        NotFoundError: "No camera found: connect one and press Start again.",
        NotReadableError: "The camera cannot be read: close what else may be using it and press Start again.",
      };
      throw new Refusal(sentences[error.name] ?? `The camera cannot be opened (${error.message || error.name}).`);
    }
  }

  async function fetchTicket() {
    const answer = await fetch(server("live/ticket"), { cache: "no-store" }).catch(() => null);
    if (!answer) throw new Refusal("The server cannot be reached: check the connection and press Start again.");
    if (answer.status === 401) throw new Refusal("You are no longer logged in: reload the page.");
    if (!answer.ok) throw new Refusal(`The server gives no ticket (${answer.status}): reload the page.`);
    return (await answer.json()).ticket;
  }

  class LivePanel extends HTMLElement {
    #turn = 0; // of the visit; what belongs to an earlier one is not listened to
    #running = null; // the list item of the running event

    connectedCallback() {
      this.find = (name) => this.querySelector(`#live-${name}`);
      this.find("start").onclick = () => this.start();
      this.find("stop").onclick = () => this.stop();
      this.find("mirror").onchange = (event) =>
        this.find("video").classList.toggle("mirrored", event.target.checked);
      this.find("video").onresize = () => this.#frame();
      this.find("bars").replaceChildren(...bars());
      window.stsmLive = {
        start: (settings) => this.start(settings),
        stop: () => this.stop(),
      };
    }

    disconnectedCallback() {
      this.#end();
    }

    // Settings are {engine, threshold, smoothing, ticket}; what is absent is the page's or the default.
    async start(settings = {}) {
      this.#end();
      const turn = this.#turn;
      this.#clear();
      this.begin = performance.now();
      this.#offer("stop");
      this.#say("busy", "asking for the camera");
      try {
        const stream = await openCamera();
        if (turn !== this.#turn) return release(stream);
        this.#show(stream, turn);
        await this.#connect(settings, turn);
      } catch (error) {
        if (turn !== this.#turn) return;
        if (!(error instanceof Refusal)) console.error(error);
        this.#fail(error instanceof Refusal ? error.message : "Something went wrong: reload the page.");
      }
    }

    stop() {
      this.#end();
      this.#say("idle", "Stopped. Press Start to go on.");
    }

    #show(stream, turn) {
      this.stream = stream;
      stream.getVideoTracks()[0].onended = () => {
        if (turn === this.#turn) this.#fail("The camera was taken away: connect it and press Start again.");
      };
      const video = this.find("video");
      video.srcObject = stream;
      video.play().catch(() => {}); // refused where it was stopped meanwhile
      this.toggleAttribute("data-camera", true);
    }

    async #connect(settings, turn) {
      this.#say("busy", "connecting");
      const { engine = null, threshold = null, smoothing = null } = { ...window.stsmSettings, ...settings };
      this.used = window.stsmSettings;
      const ticket = settings.ticket ?? (await fetchTicket());
      if (turn !== this.#turn) return;
      const address = server("live");
      address.protocol = address.protocol.replace("http", "ws");
      const socket = (this.socket = new WebSocket(address));
      socket.onopen = () => socket.send(JSON.stringify({ ticket, engine, threshold, smoothing }));
      socket.onmessage = ({ data }) => turn === this.#turn && this.#hear(JSON.parse(data));
      socket.onclose = () =>
        turn === this.#turn && this.#fail("The connection was lost: check it and press Start again.");
    }

    #hear(message) {
      if (message.kind === "waiting") this.#queue(message.position - 1);
      else if (message.kind === "opening") this.#say("busy", "opening the engine");
      else if (message.kind === "ready") this.#begin(message);
      else if (message.kind === "ended") this.#fail(sentence(message.sentence));
      else this.#take(message);
    }

    // Give the preview the camera's shape, and leave bright what the network sees.
    #frame() {
      const { videoWidth, videoHeight } = this.find("video");
      if (!videoWidth) return;
      const aspect = videoWidth / videoHeight;
      this.style.setProperty("--live-aspect", aspect);
      const [width, height] = [(this.aspect ?? aspect) / aspect, aspect / (this.aspect ?? aspect)];
      this.find("seen").style.width = `${100 * Math.min(1, width)}%`;
      this.find("seen").style.height = `${100 * Math.min(1, height)}%`;
    }

    #queue(before) {
      const text = before ? `waiting, ${before} before you` : "waiting, you are next";
      this.#say("waiting", text);
      this.#announce(text);
    }

    #begin({ threshold, aspect }) {
      this.threshold = threshold;
      this.aspect = aspect;
      this.#frame();
      this.find("bars").style.setProperty("--live-threshold", `${100 * threshold}%`);
      this.frames = new Rate();
      this.steps = new Rate();
      this.latencies = [];
      this.dropped = 0;
      this.pump = new Pump(this.find("video"), this.socket, this.begin);
      this.timer = setInterval(() => this.#measure(), REFRESH);
      this.#say("busy", "warming up");
    }

    #take(message) {
      const latency = this.pump.answered();
      const now = performance.now();
      this.frames.count(now);
      if (message.kind !== "result") return;
      this.steps.count(now);
      this.latencies = [...this.latencies.slice(-29), latency];
      this.dropped = message.dropped;
      this.last = message.time;
      this.#rank(message);
      this.#raise(message);
      for (const event of message.events) event.end === null ? this.#startEvent(event) : this.#endEvent(event);
      this.#say(message.warming_up ? "busy" : "watching", message.warming_up ? "warming up" : "watching");
    }

    #rank({ labels, scores, active }) {
      this.find("label").textContent = words(labels[0]);
      this.find("label").dataset.label = labels[0];
      this.find("score").textContent = percent(scores[0]);
      this.toggleAttribute("data-sure", scores[0] >= this.threshold);
      this.toggleAttribute("data-active", labels[0] === active);
      [...this.find("bars").children].forEach((item, i) => {
        const [fill, , name, score] = item.children;
        fill.style.transform = `scaleX(${scores[i] ?? 0})`;
        name.textContent = i in labels ? words(labels[i]) : "";
        score.textContent = i in scores ? percent(scores[i]) : "";
        item.classList.toggle("running", labels[i] === active);
      });
    }

    // The peak of the event that runs.
    #raise({ labels, scores, active }) {
      const score = scores[labels.indexOf(active)] ?? 0;
      if (this.#running?.dataset.label !== active || score <= Number(this.#running.dataset.peak)) return;
      this.#running.dataset.peak = score;
      this.#running.lastChild.textContent = percent(score);
    }

    #startEvent({ label, start, peak }) {
      const item = element("li", "running");
      item.append(element("span", "name", words(label)), element("span", "times", `since ${clock(start)}`));
      item.append(element("span", "peak", percent(peak)));
      Object.assign(item.dataset, { label, start, peak });
      this.find("events").prepend(item);
      while (this.find("events").children.length > MOST_EVENTS) this.find("events").lastChild.remove();
      this.#running = item;
      this.#announce(`${words(label)} started`);
    }

    #endEvent({ label, start, end, peak }) {
      const item = this.#running;
      if (!item) return;
      this.#running = null;
      item.classList.remove("running");
      item.dataset.end = end;
      const [, times, best] = item.children;
      times.textContent = `${clock(start)} – ${clock(end)}`;
      best.textContent = percent(peak);
      this.#announce(`${words(label)} ended after ${(end - start).toFixed(1)} seconds`);
    }

    #measure() {
      const now = performance.now();
      const latency = [...this.latencies].sort((a, b) => a - b)[this.latencies.length >> 1];
      this.find("fps").textContent = this.frames.perSecond(now).toFixed(1);
      this.find("steps").textContent = this.steps.perSecond(now).toFixed(1);
      this.find("latency").textContent = latency === undefined ? "–" : `${Math.round(latency)} ms`;
      this.find("dropped").textContent = this.dropped;
      this.#follow();
    }

    // Changed settings are a new visit, with the camera as it is, once nobody moves the sliders any more.
    #follow() {
      const settings = window.stsmSettings;
      const settled = settings === this.seen;
      this.seen = settings;
      if (!settled || JSON.stringify(settings) === JSON.stringify(this.used)) return;
      const { stream } = this;
      this.stream = null;
      this.#end();
      this.#offer("stop");
      const turn = this.#turn;
      this.#show(stream, turn);
      this.#connect({}, turn).catch((error) => {
        if (turn === this.#turn) this.#fail(error instanceof Refusal ? error.message : "Something went wrong: reload the page.");
      });
    }

    #end() {
      this.#turn += 1;
      this.pump?.stop();
      clearInterval(this.timer);
      if (this.socket) this.socket.close();
      if (this.stream) release(this.stream);
      this.find("video").srcObject = null;
      this.pump = this.socket = this.stream = null;
      if (this.#running) {
        const { label, start, peak } = this.#running.dataset;
        this.#endEvent({ label, start: Number(start), end: this.last, peak: Number(peak) });
      }
      for (const name of ["data-camera", "data-active", "data-sure"]) this.removeAttribute(name);
      this.#offer("start");
    }

    #fail(text) {
      this.#end();
      this.#say("error", text);
      this.#announce(text);
    }

    #clear() {
      for (const name of ["fps", "steps", "latency", "dropped"]) this.find(name).textContent = "–";
      this.find("label").textContent = "nothing yet";
      this.find("score").textContent = "";
      this.find("label").removeAttribute("data-label");
      this.find("events").replaceChildren();
      this.find("bars").replaceChildren(...bars());
    }

    #say(state, text) {
      if (this.dataset.state !== state) this.dataset.state = state;
      const line = this.find("state");
      if (line.textContent !== text) line.textContent = text;
    }

    #announce(text) {
      this.find("announcement").textContent = text;
    }

    // Only one of the two buttons can be pressed; the keyboard stays where it was.
    #offer(name) {
      const other = name === "start" ? "stop" : "start";
      const held = document.activeElement === this.find(other);
      this.find(name).disabled = false;
      this.find(other).disabled = true;
      if (held) this.find(name).focus();
    }
  }

  const release = (stream) => stream.getTracks().forEach((track) => track.stop());
  const sentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}.`;

  function element(tag, className, text = "") {
    return Object.assign(document.createElement(tag), { className, textContent: text });
  }

  function bars() {
    return Array.from({ length: BARS }, () => {
      const item = document.createElement("li");
      item.append(...["fill", "mark", "name", "score"].map((name) => element("span", name)));
      return item;
    });
  }

  if (!customElements.get("stsm-live")) customElements.define("stsm-live", LivePanel);
})();
