#!/usr/bin/env bash
# Prepares data/CATEGORY for training.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
    cat <<'TEXT'
usage: ./mvtec_dataset.sh CATEGORY [--url ADDRESS] [--data DIR] [--value-range LOW HIGH] [--mask-threshold X]
                          [--split-csv FILE] [--index FILE] [--check-leaks] [--split-by-parts FILE]

Prepares DIR/CATEGORY for training: checks every image and writes the index CATEGORY.csv.
The images come from the first of these that exists:
  DIR/CATEGORY                          a folder in a layout that data/README.md names, such as MVTec AD's
  DIR/CATEGORY.tar.xz                   as MVTec publishes it
  DIR/mvtec_anomaly_detection.tar.xz    the whole dataset: only CATEGORY is taken out

  --url ADDRESS   fetch such an archive into DIR first, unless the images are there already;
                  an interrupted download goes on where it stopped
  --data DIR      folder of the categories (data, beside this script)
  --value-range LOW HIGH   the values that become black and white in images of more than 8 bits; --value-range auto:
                  those found on the training images, as without it
  --mask-threshold X       pixels of masks brighter than X, 0 to 255, are defects; auto: all that are not black
  --split-csv FILE         what is for training and what for testing, in columns as VisA has them; auto: for VisA,
                  DIR/split_csv/1cls.csv, as without it
  --index FILE    where the index goes: a .csv, or a folder for CATEGORY.csv; all stages then need the same --index.
                  Without it: DIR/CATEGORY, or index/ beside this script if that takes no files
  --check-leaks   also tell how many test images show a part that is in training: photographs of the same part
                  on both sides make image measures look better than they are
  --split-by-parts FILE    also write a split for --split-csv in which no part is on both sides
TEXT
}

fail() {
    echo "mvtec_dataset.sh: $*" >&2
    exit 2
}

# fetch ADDRESS FILE: complete or not at all.
fetch() {
    command -v curl >/dev/null || fail "curl is missing: apt install curl, or put the archive at $2 yourself"
    # The address is part of the name, so that two archives are never mixed.
    local part answer status=0
    part="$2.$(printf %s "$1" | cksum | cut -d' ' -f1).part"
    answer=$(curl_to "$part" "$1") || status=$?
    if [[ $answer == 416 && $(tail -c 2 "$part") == YZ ]]; then # nothing is left to fetch, and the file ends like an xz file
        status=0
    elif [[ $status == 33 || $answer == 416 ]]; then # it cannot resume: start again
        rm -f "$part"
        status=0
        curl_to "$part" "$1" >/dev/null || status=$?
    fi
    ((status == 0)) || fail "$1: not fetched (curl's status $status); the same command goes on where it stopped"
    if [[ $(head -c 6 "$part" | od -An -tx1 | tr -d ' \n') != fd377a585a00 ]]; then
        rm -f "$part"
        fail "$1: did not give a tar.xz archive (a web page, perhaps?); give the address of the archive itself"
    fi
    mv "$part" "$2"
}

# curl_to FILE ADDRESS: continues where FILE ends, and prints the server's status code, such as 206.
curl_to() {
    local progress=--progress-bar
    [[ -t 2 ]] || progress=--silent
    curl --location --fail --show-error "$progress" --continue-at - --write-out '%{http_code}' --output "$1" "$2"
}

category='' url='' data=$root/data
options=()
while (($#)); do
    case $1 in
        -h | --help)
            usage
            exit
            ;;
        --url | --data)
            (($# > 1)) || fail "$1 needs a value; see --help"
            if [[ $1 == --url ]]; then url=$2; else data=$2; fi
            shift 2
            ;;
        --url=*)
            url=${1#*=}
            shift
            ;;
        --mask-threshold | --split-csv | --split-by-parts | --index)
            (($# > 1)) || fail "$1 takes a value; see --help"
            options+=("$1" "$2")
            shift 2
            ;;
        --value-range)
            if [[ ${2:-} == auto ]]; then
                options+=(--value-range auto)
                shift 2
            else
                (($# > 2)) || fail "$1 takes two numbers; see --help"
                options+=(--value-range "$2" "$3")
                shift 3
            fi
            ;;
        --data=*)
            data=${1#*=}
            shift
            ;;
        --check-leaks)
            options+=("$1")
            shift
            ;;
        -*)
            fail "$1: no such option; see --help"
            ;;
        *)
            [[ -z $category ]] || fail "$1: one category at a time; see --help"
            [[ -n $1 ]] || fail "the category's name is empty; see --help"
            category=$1
            shift
            ;;
    esac
done
[[ -n $category ]] || fail "which category? such as ./mvtec_dataset.sh carpet; see --help"
case $category in
    .* | */*) fail "$category: give a category's plain name, such as carpet; see --help" ;;
esac

has_images() { [[ -n $(ls -A "$data/$category" 2>/dev/null) ]]; }
own_archive=$data/$category.tar.xz
whole_archive=$data/mvtec_anomaly_detection.tar.xz

if ! has_images && [[ ! -f $own_archive ]]; then
    if [[ -n $url ]]; then
        archive=$own_archive
        [[ ${url##*/} == mvtec_anomaly_detection.tar.xz* ]] && archive=$whole_archive
        if [[ ! -f $archive ]]; then
            mkdir -p "$data"
            fetch "$url" "$archive"
        fi
    elif [[ ! -f $whole_archive ]]; then
        cat >&2 <<TEXT
mvtec_dataset.sh: there is no $data/$category, and no archive to take it from.
  MVTec AD: https://www.mvtec.com/company/research/datasets/mvtec-ad
  Its licence is CC BY-NC-SA 4.0 (https://creativecommons.org/licenses/by-nc-sa/4.0/): no commercial use.
  Download mvtec_anomaly_detection.tar.xz, or one category's archive as $category.tar.xz, into
  $data, and run this again; or give the archive's address: --url ADDRESS.
  Images of your own go into $data/$category/train/good.
TEXT
        exit 2
    fi
fi

# shellcheck source=environment.sh
source "$root/environment.sh"
prepare_environment
exec "$PYTHON" "$root/mvtec_dataset.py" "$category" --data "$data" "${options[@]}"
