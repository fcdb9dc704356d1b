// Typesets formulas with the KaTeX of this site. Pages without a formula do not load it.
{
  const folder = new URL("../assets/katex/", document.currentScript.src)
  const formulas = document.querySelectorAll(".arithmatex")
  if (formulas.length) {
    const style = Object.assign(document.createElement("link"), { rel: "stylesheet", href: new URL("katex.min.css", folder) })
    const script = Object.assign(document.createElement("script"), { src: new URL("katex.min.js", folder) })
    script.onload = () => {
      for (const formula of formulas) {
        const tex = formula.textContent.replace(/^\\[([]|\\[)\]]$/g, "")
        katex.render(tex, formula, { displayMode: formula.tagName === "DIV", throwOnError: false })
      }
    }
    document.head.append(style, script)
  }
}
