import { defineConfig } from "vite";

// Names without hashes, so that a change of the page is a change of the same files; the server sends a tag by which browsers see it.
export default defineConfig({
  base: "./",
  build: {
    outDir: "../src/trimtab/web/page",
    emptyOutDir: true,
    target: "es2022",
    modulePreload: false,
    assetsInlineLimit: 0,
    rollupOptions: {
      output: { entryFileNames: "page/page.js", chunkFileNames: "page/[name].js", assetFileNames: "page/page[extname]" },
    },
  },
});
