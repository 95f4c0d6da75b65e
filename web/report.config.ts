import { defineConfig } from "vite";

// report.html's script and style, each whole in one file: trimtab/train/page.py writes both, and the data, into the report.
export default defineConfig({
  build: {
    outDir: "../src/trimtab/web/report",
    emptyOutDir: true,
    target: "es2022",
    modulePreload: false,
    cssCodeSplit: false,
    rollupOptions: {
      input: "src/report.tsx",
      output: { format: "iife", entryFileNames: "report.js", assetFileNames: "report[extname]" },
    },
  },
});
