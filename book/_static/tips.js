/* Formulas inside tooltips. They are typeset when the tooltip is on the page and has a font size, not before:
   sphinx_tippy's own hook comes earlier, and MathJax then computes with sizes that are not numbers. */
tippy.setDefaultProps({
  onMount(instance) {
    if (window.MathJax && MathJax.typesetPromise) {
      MathJax.typesetPromise([instance.popper]).then(() => {
        if (instance.popperInstance) {
          instance.popperInstance.update();
        }
      });
    }
  },
});
