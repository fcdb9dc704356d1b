// The sliders of guides/accuracy.md: one label above n - 1 equal logits, by both formulas, each operation rounded to float32.
const margins = document.getElementById("margins")
if (margins) {
  const f = (x) => (Math.abs(x) < 2 ** -126 ? 0 : Math.fround(x)) // a CPU takes smaller numbers for 0
  const show = () => {
    const [margin, classes, offset] = [...margins.querySelectorAll("input")].map((input) => Number(input.value))
    const n = 2 ** classes
    const rest = offset && 10 ** offset
    const label = f(rest + margin)
    const other = f(Math.exp(f(rest - label)))
    let others = 0
    for (let j = 1; j < n; j++) others = f(others + other)
    const all = f(1 + others)
    const usual = f(f(label + f(Math.log(all))) - label)
    const ours = f(Math.log1p(others))
    const exact = Math.log1p((n - 1) * Math.exp(rest - label))
    const rows = [
      [usual, f(f(1 / all) - 1)],
      [ours, f(Math.expm1(-ours))],
      [exact, Math.expm1(-exact)],
    ]
    const digits = (x) => (x === 0 ? "0" : x.toExponential(5))
    margins.querySelectorAll("output").forEach((output, i) => (output.value = [margin, n, rest][i]))
    margins.querySelectorAll("tbody tr").forEach((row, i) => rows[i].forEach((x, j) => (row.cells[j + 1].textContent = digits(x))))
  }
  margins.addEventListener("input", show)
  show()
}
