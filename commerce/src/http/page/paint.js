// Reports the first contentful paint once, and whether early hints had been used.
new PerformanceObserver((list) => {
  for (const paint of list.getEntriesByName('first-contentful-paint')) {
    const style = performance.getEntriesByType('resource').find((entry) => entry.name.includes('/assets/style-'));
    const hinted = style !== undefined && style.initiatorType === 'early-hints';
    navigator.sendBeacon('/api/v1/vitals', JSON.stringify({ fcp_ms: Math.round(paint.startTime), hinted }));
  }
}).observe({ type: 'paint', buffered: true });
