{{/* The beginning of the names of objects. */}}
{{- define "ociregistry.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "ociregistry.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* The labels by which pods of one component are found: (list ROOT COMPONENT). */}}
{{- define "ociregistry.selectorLabels" -}}
{{- $root := first . -}}
app.kubernetes.io/name: {{ include "ociregistry.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ last . }}
{{- end -}}

{{/* The labels of a pod: (list ROOT COMPONENT). None that changes with each version of the chart, and would replace pods. */}}
{{- define "ociregistry.podLabels" -}}
{{ include "ociregistry.selectorLabels" . }}
{{- with (first .).Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The labels of an object: (list ROOT COMPONENT). */}}
{{- define "ociregistry.labels" -}}
{{- $root := first . -}}
{{ include "ociregistry.podLabels" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end -}}

{{- define "ociregistry.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ default $.Chart.AppVersion .tag }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "ociregistry.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "ociregistry.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Whether all pods may write the volume; empty if not. */}}
{{- define "ociregistry.isShared" -}}
{{- with .Values.persistence -}}
{{- if and (has .type (list "claim" "existingClaim")) (has "ReadWriteMany" .accessModes) -}}true{{- end -}}
{{- end -}}
{{- end -}}

{{- define "ociregistry.adminPort" -}}
{{- last (splitList ":" .Values.adminListen) -}}
{{- end -}}

{{- define "ociregistry.nodeConfigurerNamespace" -}}
{{- default .Release.Namespace .Values.nodeConfigurer.namespace -}}
{{- end -}}

{{/* Fail for values that contradict each other. */}}
{{- define "ociregistry.check" -}}
{{- $claim := .Values.persistence -}}
{{- if and (gt (int .Values.replicas) 1) (not (include "ociregistry.isShared" .)) -}}
{{- fail (printf "replicas: %d pods need one volume that all of them can write: set persistence.accessModes to [ReadWriteMany], with the type claim or existingClaim and a storage class that offers it (persistence.type is %s)" (int .Values.replicas) $claim.type) -}}
{{- end -}}
{{- if and (eq $claim.type "existingClaim") (not $claim.existingClaim) -}}
{{- fail "persistence.existingClaim: the name of the claim is missing" -}}
{{- end -}}
{{- if and $claim.existingClaim (ne $claim.type "existingClaim") -}}
{{- fail (printf "persistence.existingClaim: has no effect with persistence.type %s: set the type existingClaim" $claim.type) -}}
{{- end -}}
{{- /* Kubernetes would refuse the claim alone, and two pods would share a volume that is not made for that. */ -}}
{{- $name := include "ociregistry.fullname" . -}}
{{- with ternary (lookup "v1" "PersistentVolumeClaim" .Release.Namespace $name) dict (eq $claim.type "claim") -}}
{{- if ne (sortAlpha .spec.accessModes | join " ") (sortAlpha $claim.accessModes | join " ") -}}
{{- fail (printf "persistence.accessModes: the claim %s exists with %s, which Kubernetes cannot change: delete that claim, and with it what is cached, or name another by the type existingClaim" $name (join ", " .spec.accessModes)) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.service.clusterIP (eq .Values.service.clusterIP "None") -}}
{{- fail "service.clusterIP: nodes do not resolve the names of Services, so that a headless one is of no use" -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) -}}
{{- fail "ingress.hosts: a host name is missing" -}}
{{- end -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.parentRefs: a gateway is missing" -}}
{{- end -}}
{{- if .Values.nodeConfigurer.enabled -}}
{{- if and (eq .Values.service.type "ClusterIP") (not .Values.nodeConfigurer.urls) -}}
{{- fail "nodeConfigurer.urls: with service.type ClusterIP the address that nodes use is missing, such as http://10.96.0.80:8080 with service.clusterIP" -}}
{{- end -}}
{{- else if .Values.nodeConfigurer.remove -}}
{{- fail "nodeConfigurer.remove: needs nodeConfigurer.enabled, since its pods remove what they wrote" -}}
{{- end -}}
{{- end -}}
