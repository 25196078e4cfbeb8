// Before anything is drawn: the theme that was chosen on an earlier visit.
try {
  const chosen = localStorage.getItem("tunesmith-theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
} catch { /* a browser that keeps nothing follows the system */ }
