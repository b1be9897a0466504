// The sidebar opens where one is
addEventListener('DOMContentLoaded', () => {
    const here = document.querySelector('.sidebar-tree .current-page > .reference')
    const drawer = here && here.closest('.sidebar-scroll')
    if (drawer) drawer.scrollTop = here.offsetTop - drawer.clientHeight / 3
})
