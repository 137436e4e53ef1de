# What the recipes share: their first options, and running a command or only showing it.
DRY= TINY=
while [ $# -gt 0 ]; do
    case $1 in
    --dry) DRY=1 ;;
    --tiny) TINY=1 ;;
    *) break ;;
    esac
    shift
done
KVERASER=${KVERASER:-kveraser} PYTHON=${PYTHON:-python}

run() {
    echo "$@"
    [ -n "$DRY" ] || "$@"
}
