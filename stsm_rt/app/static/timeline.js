// Brings the timeline to life: clicks seek the video, a line follows its playback. The page replaces both whenever
// there are new results, so nothing is bound to an element.
(() => {
  "use strict";

  const player = () => document.querySelector("#result-video video");

  function place(video) {
    for (const timeline of document.querySelectorAll(".stsm-timeline")) {
      const share = Math.min(1, video.currentTime / Number(timeline.dataset.duration));
      timeline.querySelector(".stsm-cursor").style.left = `${100 * share}%`;
    }
  }

  function follow(video) {
    place(video);
    if (video === player() && !video.paused && !video.ended) {
      requestAnimationFrame(() => follow(video));
    }
  }

  // Events of media do not bubble, but they can be captured on their way down.
  for (const name of ["loadedmetadata", "play", "seeking", "seeked", "timeupdate", "ended"]) {
    document.addEventListener(name, (event) => {
      if (event.target === player()) {
        (name === "play" ? follow : place)(event.target);
      }
    }, true);
  }

  // Enter and Space on a span are clicks too: spans are buttons.
  document.addEventListener("click", (event) => {
    const track = event.target.closest(".stsm-timeline .stsm-track");
    const video = player();
    if (!track || !video) {
      return;
    }
    const span = event.target.closest("[data-time]");
    const duration = Number(track.closest(".stsm-timeline").dataset.duration);
    const box = track.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    video.currentTime = span ? Number(span.dataset.time) : share * duration;
    place(video);
  });
})();
