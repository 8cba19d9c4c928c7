{{/*
The path of a file that the configuration names, relative to the configuration's folder.

  what    where the value is, for messages
  value   PEM text, an absolute path, or with `secret` a key of it
  secret  name of an existing Secret, or empty
  own     key for the text in the chart's own Secret
  files   dict with `own` (key: text) and `existing` (path: {secret, key}), which are added to
*/}}
{{- define "ociregistry.file" -}}
{{- if .secret -}}
{{- if not (regexMatch "^[-._a-zA-Z0-9]+$" .value) -}}
{{- fail (printf "%s: beside `secret`, the name of a key of the Secret %s is expected" .what .secret) -}}
{{- end -}}
{{- $path := printf "secrets/%s/%s" .secret .value -}}
{{- $_ := set .files.existing $path (dict "secret" .secret "key" .value) -}}
{{- $path -}}
{{- else if contains "-----BEGIN " .value -}}
{{- $_ := set .files.own .own .value -}}
{{- .own -}}
{{- else if hasPrefix "/" .value -}}
{{- .value -}}
{{- else -}}
{{- fail (printf "%s: PEM text, an absolute path, or a key beside `secret` is expected" .what) -}}
{{- end -}}
{{- end -}}

{{/* Refuse a proxy with a password, which would be in the ConfigMap: {what, value}. */}}
{{- define "ociregistry.proxy" -}}
{{- if contains "@" (toString .value) -}}
{{- fail (printf "%s: a password would be in the ConfigMap: set HTTP_PROXY and HTTPS_PROXY by extraEnv from a Secret instead" .what) -}}
{{- end -}}
{{- end -}}

{{/*
The configuration as JSON.

  config  the daemon's file, as an object
  own     the chart's own Secret, key: text
  existing  path below the folder of the configuration: {secret, key}
  preload   the list of images, as text
  late    what takes effect at the next start alone
*/}}
{{- define "ociregistry.configuration" -}}
{{- include "ociregistry.check" . -}}
{{- $files := dict "own" (dict) "existing" (dict) -}}
{{- $config := deepCopy .Values.config -}}
{{- with $config.proxy }}{{ include "ociregistry.proxy" (dict "what" "config.proxy" "value" .) }}{{ end -}}
{{- $_ := set $config "admin_listen" .Values.adminListen -}}

{{- $registries := list -}}
{{- range $entry := .Values.registries -}}
{{- $entry = deepCopy $entry -}}
{{- $what := printf "registries (%s)" $entry.name -}}
{{- $own := regexReplaceAll "[^-._a-zA-Z0-9]" $entry.name "_" -}}
{{- with $entry.proxy }}{{ include "ociregistry.proxy" (dict "what" (printf "%s.proxy" $what) "value" .) }}{{ end -}}
{{- with $entry.auth -}}
{{- if .identity_token -}}
{{- fail (printf "%s.auth.identity_token: it would be in the ConfigMap: use user with password or secret" $what) -}}
{{- end -}}
{{- if and .secret (or .password .password_file .password_env) -}}
{{- fail (printf "%s.auth: secret, password, password_file and password_env exclude each other" $what) -}}
{{- end -}}
{{- if and .key (not .secret) -}}
{{- fail (printf "%s.auth.key: has no effect without secret" $what) -}}
{{- end -}}
{{- if .secret -}}
{{- $args := dict "what" (printf "%s.auth.key" $what) "value" (default "password" .key) "secret" .secret "files" $files -}}
{{- $_ := set . "password_file" (include "ociregistry.file" $args) -}}
{{- else if .password -}}
{{- $key := printf "%s.password" $own -}}
{{- $_ := set $files.own $key (toString .password) -}}
{{- $_ := set . "password_file" $key -}}
{{- end -}}
{{- $_ := set $entry "auth" (omit . "secret" "key" "password") -}}
{{- end -}}
{{- with $entry.tls -}}
{{- $tls := omit . "secret" -}}
{{- $secret := .secret -}}
{{- if and .secret (not (or .ca .cert .key)) -}}
{{- fail (printf "%s.tls.secret: name its keys, such as `ca: ca.crt`" $what) -}}
{{- end -}}
{{- range $key := list "ca" "cert" "key" -}}
{{- with get $tls $key -}}
{{- $args := dict "what" (printf "%s.tls.%s" $what $key) "value" . "secret" $secret "own" (printf "%s.%s" $own $key) "files" $files -}}
{{- $_ := set $tls $key (include "ociregistry.file" $args) -}}
{{- end -}}
{{- end -}}
{{- $_ := set $entry "tls" $tls -}}
{{- end -}}
{{- $registries = append $registries $entry -}}
{{- end -}}
{{- if $registries }}{{ $_ := set $config "registries" $registries }}{{ end -}}

{{- with .Values.tls -}}
{{- $secret := .secret -}}
{{- $given := dict "cert" .cert "key" .key "client_ca" .client_ca -}}
{{- if .secret -}}
{{- $given = mustMergeOverwrite (dict "cert" "tls.crt" "key" "tls.key") (pick . "client_ca") (ternary (pick . "cert") (dict) (ne .cert "")) (ternary (pick . "key") (dict) (ne .key "")) -}}
{{- else if or .cert .key .client_ca -}}
{{- if not (and .cert .key) -}}
{{- fail "tls: a certificate and its key go together: give tls.secret, or tls.cert and tls.key" -}}
{{- end -}}
{{- end -}}
{{- $tls := dict -}}
{{- range $key, $value := $given -}}
{{- if $value -}}
{{- $args := dict "what" (printf "tls.%s" $key) "value" $value "secret" $secret "own" (printf "server.%s" $key) "files" $files -}}
{{- $_ := set $tls $key (include "ociregistry.file" $args) -}}
{{- end -}}
{{- end -}}
{{- if $tls }}{{ $_ := set $config "tls" $tls }}{{ end -}}
{{- end -}}

{{- if .Values.preload }}{{ $_ := set $config "preload_images" "images.txt" }}{{ end -}}

{{- /* The daemon applies everything else when it sees that its files have changed. */ -}}
{{- $late := dict "preload" .Values.preload "tls" (hasKey $config "tls") -}}
{{- range list "admin_listen" "log_format" "pull_timeout" "always_pull_latest" "air_gapped" "complete_images" "complete_metadata" "complete_platforms" "concurrent" "arch" "os" "os_version" "platform" "with_signatures" -}}
{{- if hasKey $config . }}{{ $_ := set $late . (get $config .) }}{{ end -}}
{{- end -}}
{{- dict "config" $config "own" $files.own "existing" $files.existing "preload" (printf "%s\n" (join "\n" .Values.preload)) "late" $late | toJson -}}
{{- end -}}
