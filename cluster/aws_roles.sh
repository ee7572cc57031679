#!/usr/bin/env bash
# Create the two roles that aws.yaml uses, with access to one bucket:
#   cluster/aws_roles.sh create BUCKET    t2idist-head starts and terminates machines; t2idist-worker reads and writes BUCKET only
#   cluster/aws_roles.sh delete
# Needs the aws command, with the permission to create roles.
set -euo pipefail
what=${1:-}
bucket=${2:-}

trust='{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "sts:AssumeRole",
  "Principal": {"Service": "ec2.amazonaws.com"}}]}'

policy_of() {
  local objects="{\"Effect\": \"Allow\", \"Action\": [\"s3:GetObject\", \"s3:PutObject\", \"s3:DeleteObject\",
    \"s3:AbortMultipartUpload\"], \"Resource\": \"arn:aws:s3:::$bucket/*\"}"
  local listing="{\"Effect\": \"Allow\", \"Action\": \"s3:ListBucket\", \"Resource\": \"arn:aws:s3:::$bucket\"}"
  local machines=""
  if [[ $1 == head ]]; then
    machines=", {\"Effect\": \"Allow\", \"Action\": [\"ec2:Describe*\", \"ec2:RunInstances\", \"ec2:TerminateInstances\",
      \"ec2:CreateTags\", \"ec2:DeleteTags\"], \"Resource\": \"*\"},
      {\"Effect\": \"Allow\", \"Action\": \"iam:PassRole\", \"Resource\": \"arn:aws:iam::*:role/t2idist-worker\"}"
  fi
  echo "{\"Version\": \"2012-10-17\", \"Statement\": [$objects, $listing$machines]}"
}

case $what in
  create)
    if [[ ! $bucket =~ ^[a-z0-9][a-z0-9.-]+$ ]]; then
      echo "usage: cluster/aws_roles.sh create BUCKET" >&2
      exit 2
    fi
    aws iam create-service-linked-role --aws-service-name spot.amazonaws.com >/dev/null 2>&1 || true # fails if it exists already
    for kind in worker head; do
      role=t2idist-$kind
      if ! aws iam get-role --role-name "$role" >/dev/null 2>&1; then
        aws iam create-role --role-name "$role" --assume-role-policy-document "$trust" >/dev/null
      fi
      aws iam put-role-policy --role-name "$role" --policy-name t2idist --policy-document "$(policy_of "$kind")"
      if ! aws iam get-instance-profile --instance-profile-name "$role" >/dev/null 2>&1; then
        aws iam create-instance-profile --instance-profile-name "$role" >/dev/null
        aws iam add-role-to-instance-profile --instance-profile-name "$role" --role-name "$role"
      fi
    done
    ;;
  delete)
    for role in t2idist-head t2idist-worker; do
      aws iam remove-role-from-instance-profile --instance-profile-name "$role" --role-name "$role"
      aws iam delete-instance-profile --instance-profile-name "$role"
      aws iam delete-role-policy --role-name "$role" --policy-name t2idist
      aws iam delete-role --role-name "$role"
    done
    ;;
  *)
    echo "usage: cluster/aws_roles.sh create BUCKET | delete" >&2
    exit 2
    ;;
esac
