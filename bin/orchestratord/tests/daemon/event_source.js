// Follows `url` as any page or agent would, and reports what came once the source is closed for good.
function watch(EventSource, url, report) {
  const source = new EventSource(url);
  const seen = [];
  for (const name of ['queued', 'waiting', 'started', 'attempt', 'token', 'metrics', 'end', 'lagged', 'shutdown']) {
    source.addEventListener(name, (event) => seen.push([name, event.lastEventId]));
  }
  source.addEventListener('error', (event) => {
    // The event `error` of the job has data; the source's own, which says that the connection is gone, has none.
    if (event.data !== undefined) seen.push(['error', event.lastEventId]);
    if (source.readyState === 2) report(seen);
  });
}
