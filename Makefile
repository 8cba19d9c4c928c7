# Each target sets up what it needs, so that `make run` and `make test` suffice on a fresh Debian 12. Missing Debian
# packages are installed where permitted (root, or sudo without a password); else their list is printed. Everything
# else goes into .venv, which holds the dependencies but not the package: the checkout is on PYTHONPATH, so that twistd
# finds its plugin.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.SILENT:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
PYTHON := $(VENV)/bin/python
SERVERS := docker-registry containerd skopeo jq nginx-light strace openssl curl iproute2 ca-certificates mount rsync \
	bsdextrautils systemd e2fsprogs faketime tinyproxy wrk bindfs fuse3 prometheus chromium chromium-driver \
	fonts-dejavu-core pngquant
# Beside these, for the long tests.
DISTRIBUTED := glusterfs-server syncthing
DEBIANS := python3-twisted python3-treq python3-pytest python3-pytest-twisted python3-pytest-xdist python3-hypothesis \
	python3-cryptography python3-openssl python3-service-identity python3-yaml python3-tqdm \
	python3-cachetools python3-prometheus-client python3-zstandard
BUILDERS := build-essential bash-completion debhelper dh-python lintian pybuild-plugin-pyproject \
	python3-cachetools python3-openssl python3-prometheus-client python3-service-identity python3-setuptools \
	python3-tqdm python3-treq python3-twisted python3-yaml python3-zstandard
BOOTERS := mmdebstrap systemd-container docker-registry zsh
IMAGERS := mmdebstrap
EMULATORS := arch-test binfmt-support qemu-user-static
RUNNERS := buildah busybox-static containerd curl docker-registry podman runc skopeo
ARCH := $(shell dpkg --print-architecture)
NODES := containernetworking-plugins runc iproute2 iptables nftables mount util-linux docker-registry busybox-static
# Packages of a machine booted for a test, beside the minimum and the dependencies of our package.
INSIDE := systemd,systemd-sysv,dbus,ca-certificates,containerd,curl,docker-registry,man-db

# Replaces the caller's value: a test must never find another checkout's code.
export PYTHONPATH := $(CURDIR)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Some servers are in sbin, which only root has on its PATH.
TEST_PATH := $(CURDIR)/$(VENV)/bin:$(PATH):/usr/sbin:/sbin
# Programs in Go are built once for all checkouts, each version in a folder of its own: about a minute.
PROGRAMS := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/ociregistry
HELM := $(PROGRAMS)/helm-3.22.0/helm
KUBECONFORM := $(PROGRAMS)/kubeconform-0.8.0/kubeconform
CONTAINERD := $(PROGRAMS)/containerd-2.4.2/containerd
version_of = $(shell sed -n 's|^[^=]*$(1) v\([0-9.]*\).*|\1|p' tests/kubernetes/binaries/*/go.mod)
ETCD := $(PROGRAMS)/etcd-$(call version_of,go.etcd.io/etcd/server/v3)/etcd
# 10 to 35 minutes, and 4 GB of Go's caches.
KUBERNETES := $(PROGRAMS)/kubernetes-$(call version_of,k8s.io/kubernetes)/kubernetes
CLUSTER := $(CONTAINERD) $(ETCD) $(HELM) $(KUBERNETES)
CHART := charts/ociregistry
# Recipes that name MAKE themselves would run under `make -n` too, and as a whole because of .ONESHELL.
again = $(MAKE) --no-print-directory
# Kept for .ci/run, which counts the tests that ran.
JUNIT = --junitxml=build/junit-$@

.PHONY: help run test test-long test-debian test-deb test-image test-chart test-kubernetes deb image chart docs lint clean

help: ## show this
	sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile

run: $(VENV)/run.stamp ## start the daemon here, in the foreground, with ./images as its store; OPTIONS=--config-path=FILE
	$(VENV)/bin/twistd -n --pidfile= ociregistry --image-path ./images --port 8080 --log-level info $(OPTIONS)

test: $(VENV)/test.stamp ## run all tests except the long ones, in memory and against real servers (needs root)
	$(call root,test)
	$(call need,$(SERVERS))
	export PATH="$(TEST_PATH)"
	$(PYTHON) -m pytest $(JUNIT)-unit.xml -m 'not long' -n 2 --dist loadfile tests/unit
	# A test that hangs ends the run: xdist would begin it again and again. Debian's pytest lacks the option.
	hangs=(-o faulthandler_exit_on_timeout=true --max-worker-restart=0)
	$(PYTHON) -m pytest $(JUNIT)-real.xml "$${hangs[@]}" -m 'not long' -n 2 --dist loadfile tests/real

test-long: $(VENV)/test.stamp ## run the long tests (needs root)
	$(call root,test-long)
	$(call need,$(SERVERS) $(RUNNERS) $(DISTRIBUTED))
	# The tests of the image compare with it.
	$(again) image
	# Several last longer than the five minutes after which a test is said to hang.
	PATH="$(TEST_PATH)" $(PYTHON) -m pytest $(JUNIT).xml -o faulthandler_timeout=900 -m long tests

test-debian: ## run the tests in memory on Debian's Python, Twisted and other packages, without pip
	$(call need,$(DEBIANS))
	export PATH=/usr/sbin:/usr/bin:/sbin:/bin PYTHONNOUSERSITE=1
	python3 -c "$$ONLY_DEBIAN"
	python3 -m pytest $(JUNIT).xml -m 'not long' -n 2 --dist loadfile tests/unit

deb: ## build the Debian package, into build/
	$(call need,$(BUILDERS))
	export PATH=/usr/sbin:/usr/bin:/sbin:/bin
	rm -rf build/deb build/ociregistry_*
	mkdir -p build/deb/ociregistry
	# Dated by the changelog, so that the package is the same from each checkout.
	date=@$$(dpkg-parsechangelog -S Timestamp)
	git ls-files -z --cached | tar -c --null --mtime="$$date" --files-from=- | tar -x -C build/deb/ociregistry
	cd build/deb/ociregistry
	# Without a network, where the kernel permits that: nothing may be fetched.
	offline=(unshare --map-root-user --net)
	"$${offline[@]}" true 2>/dev/null || offline=()
	"$${offline[@]}" dpkg-buildpackage --no-sign >../log 2>&1 || { cat ../log; exit 1; }
	mv ../ociregistry_* ../..
	cd ../..
	ls ociregistry_*

test-deb: $(VENV)/test.stamp ## test the package on booted Debian 12 and 13 (needs root)
	$(call containers,test-deb,package)
	$(call need,$(BOOTERS))
	$(again) deb
	$(again) -j 2 build/bookworm.tar build/trixie.tar
	PATH="$(TEST_PATH)" $(PYTHON) -m pytest $(JUNIT).xml tests/deb

image: ## build the container image, into build/; ARCH=arm64 for that architecture (needs root)
	[ $$(id -u) = 0 ] || { echo >&2 "Files of an image belong to root: sudo make image"; exit 1; }
	$(call need,$(IMAGERS))
	if [ $(ARCH) != "$$(dpkg --print-architecture)" ]; then
	    $(call need,$(EMULATORS))
	    arch-test $(ARCH) >/dev/null || {
	        echo >&2 "This machine runs no programs for $(ARCH): its kernel lacks binfmt_misc, or that is not mounted"
	        exit 1
	    }
	fi
	$(again) deb
	$(call sources,bookworm) >build/image.list
	# The user has a fixed number, by which volumes are given to it; our package keeps a user that is there.
	user=ociregistry:x:65532:65532::/var/lib/ociregistry:/usr/sbin/nologin
	mmdebstrap --quiet --variant=essential --architectures=$(ARCH) \
	    --aptopt='Acquire::Retries "3"' --dpkgopt=force-unsafe-io \
	    --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr --hook-dir=/usr/share/mmdebstrap/hooks/file-mirror-automount \
	    --essential-hook="echo $$user >>\"\$$1/etc/passwd\"; echo ociregistry:x:65532: >>\"\$$1/etc/group\"" \
	    --customize-hook='chroot "$$1" env -i PYTHONHASHSEED=0 /usr/bin/python3 -s - <tools/image/prepare.py' \
	    --include=usr-is-merged,systemd-standalone-sysusers,ca-certificates,tzdata \
	    --include="$$(echo $$PWD/build/ociregistry_*_all.deb)" bookworm build/root.tar build/image.list \
	    >build/image.log 2>&1 || { cat build/image.log; exit 1; }
	# Only a commit tells what is in it.
	revision=$$(git diff --quiet HEAD && git rev-parse HEAD || true)
	/usr/bin/python3 -m tools.image build/root.tar build --architecture $(ARCH) \
	    --date $$(git log -1 --format=%ct) --revision "$$revision"
	rm build/root.tar
	ls build/ociregistry-*-$(ARCH).*

test-image: $(VENV)/test.stamp ## test the container image in podman and containerd (needs root)
	$(call containers,test-image,image)
	$(call need,$(RUNNERS))
	$(again) image
	PATH="$(TEST_PATH)" $(PYTHON) -m pytest $(JUNIT).xml -m 'not long' tests/image

chart: $(HELM) ## package the Helm chart, into build/ (needs Go)
	mkdir -p build/chart
	rm -f build/chart/* build/ociregistry-chart-*
	# A link to a file outside the chart becomes that file.
	$(HELM) package $(CHART) --destination build/chart >build/chart/log 2>&1 || { cat build/chart/log; exit 1; }
	for package in build/chart/ociregistry-*.tgz; do
	    mv "$$package" "build/ociregistry-chart-$${package##*/ociregistry-}"
	done
	ls build/ociregistry-chart-*

test-chart: $(VENV)/test.stamp $(HELM) $(KUBECONFORM) ## test the Helm chart, without a cluster (needs Go)
	PATH="$(dir $(HELM)):$(dir $(KUBECONFORM)):$(TEST_PATH)"
	$(again) chart
	$(PYTHON) -m pytest $(JUNIT).xml -n 2 tests/chart

test-kubernetes: $(VENV)/test.stamp $(CLUSTER) ## test image and chart in a real Kubernetes, built here (needs root and Go)
	$(call root,test-kubernetes)
	$(call need,$(NODES))
	$(again) image chart
	PATH="$(TEST_PATH)" CLUSTER="$(subst / ,/:,$(dir $(CLUSTER)))" $(PYTHON) -m pytest $(JUNIT).xml tests/kubernetes

lint: $(VENV)/test.stamp ## check style, layout and types
	$(VENV)/bin/ruff check --output-format=concise
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

docs: $(VENV)/docs.stamp ## build the documentation as a site, into build/site
	$(VENV)/bin/mkdocs build --strict

clean: ## remove what the other targets made, except ./images
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache _trial_temp* twistd.pid
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -f twisted/plugins/dropin.cache

# Made once, and again when setup.py changes. Debian's Python is preferred, since the daemon runs on it.
$(VENV)/run.stamp: setup.py
	for python in /usr/bin/python3 python3 none; do
	    $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
	done
	if [ $$python = none ]; then
	    $(call need,python3-venv)
	    python=/usr/bin/python3
	fi
	$$python -m venv --clear $(VENV)
	$(PYTHON) -m pip install --quiet setuptools
	$(PYTHON) -c "$$REQUIREMENTS" > $(VENV)/run.txt
	$(PYTHON) -m pip install --quiet --requirement $(VENV)/run.txt
	touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp
	$(PYTHON) -c "$$REQUIREMENTS" test > $(VENV)/test.txt
	$(PYTHON) -m pip install --quiet --requirement $(VENV)/test.txt
	touch $@

$(VENV)/docs.stamp: $(VENV)/run.stamp
	$(PYTHON) -c "$$REQUIREMENTS" docs > $(VENV)/docs.txt
	$(PYTHON) -m pip install --quiet --requirement $(VENV)/docs.txt
	touch $@

$(PROGRAMS)/helm-%/helm:
	# Else it takes every cluster that it does not ask for Kubernetes 1.20.
	$(call go,$(@D),helm.sh/helm/v3/cmd/helm@v$*,-X helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor=37)

$(PROGRAMS)/kubeconform-%/kubeconform:
	$(call go,$(@D),github.com/yannh/kubeconform/cmd/kubeconform@v$*)

$(PROGRAMS)/containerd-%/containerd:
	$(call go,$(@D),$(foreach one,ctr containerd-shim-runc-v2 containerd,github.com/containerd/containerd/v2/cmd/$(one)@v$*))

$(PROGRAMS)/etcd-%/etcd:
	cd tests/kubernetes/binaries/etcd
	$(call go,$(@D),go.etcd.io/etcd/server/v3)
	mv $(@D)/server $@

$(PROGRAMS)/kubernetes-%/kubernetes:
	cd tests/kubernetes/binaries/kubernetes
	IFS=. read -r major minor _ <<<$*
	version=k8s.io/component-base/version
	$(call go,$(@D),.,-X $$version.gitVersion=v$* -X $$version.gitMajor=$$major -X $$version.gitMinor=$$minor)

# The files of a test machine, from this machine's package sources: made once, and again when debian/control changes.
build/%.tar: debian/control
	mkdir -p build
	depends=$$(sed -n '/^Depends:/,/^ \$$/s/^ \([a-z][a-z0-9-]*\).*/\1/p' debian/control | paste -s -d ,)
	$(call sources,$*) >build/$*.list
	mmdebstrap --quiet --variant=apt --aptopt='Acquire::Retries "3"' --include="$(INSIDE),$$depends" $* $@ build/$*.list

# The only list of dependencies is in setup.py; pip cannot install them without the package itself.
define REQUIREMENTS
import setuptools, sys
from distutils.core import run_setup
package = run_setup("setup.py", stop_after="init")
print(*package.install_requires, *(one for extra in sys.argv[1:] for one in package.extras_require[extra]), sep="\n")
endef
export REQUIREMENTS

define ONLY_DEBIAN
import subprocess, sys
import OpenSSL, cachetools, cryptography, hypothesis, prometheus_client, pytest, pytest_twisted, service_identity, tqdm, treq, twisted, yaml, zstandard
debian = subprocess.check_output(["dpkg-query", "-Wf", "$${Version}", "python3-twisted"], text=True)
print(f"Python {sys.version.split()[0]} at {sys.executable}, Twisted {twisted.__version__} of python3-twisted {debian}")
if sys.prefix != "/usr" or not debian.startswith(f"{twisted.__version__}-"):
    sys.exit("this is not Debian's own Python and Twisted")
modules = (OpenSSL, cachetools, cryptography, hypothesis, prometheus_client, pytest, pytest_twisted, service_identity, tqdm, treq, twisted, yaml, zstandard)
if foreign := [m.__file__ for m in modules if not m.__file__.startswith("/usr/lib/python3/dist-packages/")]:
    sys.exit(f"not from Debian: {foreign}")
endef
export ONLY_DEBIAN

# $(call sources,SUITE): print this machine's package sources, for another suite of Debian.
define sources
(
. /etc/os-release
apt-get indextargets --format 'deb $$(REPO_URI) $$(RELEASE) $$(COMPONENT)' 'Created-By: Packages' 'Origin: Debian' |
    sed "s/ $$VERSION_CODENAME/ $(1)/"
)
endef

# $(call go,FOLDER,PACKAGE,FLAGS): build a program of a Go module, with these flags of the linker. A Go that is older than
# the module demands gets a newer one, which it can from 1.21 on.
define go
go version 2>/dev/null | grep -Eq 'go(1\.(2[1-9]|[3-9][0-9])|[2-9])' || {
    echo >&2 "Go 1.21 or later is needed to build $(notdir $(1)): $$(go version 2>/dev/null || echo there is none in PATH)"
    exit 1
}
echo "Building $(notdir $(1))"
GOBIN=$(1) GOTOOLCHAIN=auto CGO_ENABLED=0 nice go install -buildvcs=false -trimpath -ldflags "-s -w $(3)" $(2)
endef

# $(call root,TARGET): fail without root, which containerd needs to unpack images, and tests for network namespaces.
define root
[ $$(id -u) = 0 ] || { echo >&2 "Tests against real clients need root: sudo make $(1)"; exit 1; }
endef

# $(call containers,TARGET,WHAT): end here without root, which containers need, or where the kernel forbids them.
define containers
if [ $$(id -u) != 0 ]; then
    echo >&2 "Containers need root: sudo make $(1)"
    exit 1
elif ! unshare --fork --pid --mount --net --mount-proc true 2>/dev/null; then
    echo "=== SKIPPED: this kernel forbids containers, so the $(2) was not tested"
    exit 0
fi
endef

# $(call need,PACKAGES): install them, or print what to install. Their services are started neither now nor at boot:
# the tests start their own, on other ports.
define need
(
missing=() new=()
for package in $(1); do
    dpkg-query -Wf '$${db:Status-Status}\n' $$package 2>/dev/null | grep -qx installed || missing+=($$package)
done
[ $${#missing[@]} != 0 ] || exit 0
may=(env DEBIAN_FRONTEND=noninteractive)
if [ $$(id -u) != 0 ]; then
    sudo -n true 2>/dev/null || { echo >&2 "Please install first: apt-get install $${missing[*]}"; exit 1; }
    may=(sudo -n "$${may[@]}")
fi
for service in docker-registry containerd nginx tinyproxy prometheus glusterd; do
    [ -e /lib/systemd/system/$$service.service ] || new+=($$service)
done
policy=/usr/sbin/policy-rc.d
if [ ! -e $$policy ]; then
    trap "$${may[*]} rm -f $$policy" EXIT
    printf '#!/bin/sh\nexit 101\n' | "$${may[@]}" tee $$policy >/dev/null
    "$${may[@]}" chmod +x $$policy
fi
echo "Installing $${missing[*]}"
apt=("$${may[@]}" apt-get -qq -y -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300)
"$${apt[@]}" update
"$${apt[@]}" install --no-install-recommends "$${missing[@]}" </dev/null >/dev/null
for service in "$${new[@]}"; do
    "$${may[@]}" systemctl --quiet disable $$service 2>/dev/null || true
done
)
endef
