#!/usr/bin/env bash
# Makes in an AWS account what cluster/aws.yaml needs, once, by an administrator; what is there already is kept, and
# policies are written anew. From the repository:
#   BUCKET=my-bucket SSH_FROM=203.0.113.7/32 bash cluster/aws_setup.sh
# BUCKET exists and holds the slides; SSH_FROM is who may reach the nodes by ssh. REGION is the bucket's; IMAGE and AMI
# may be named where they are others'. Leaves ~/.lemon-cluster (token and password, which nodes get), ~/.ssh/lemon (the
# ssh key) and ~/.lemon-cluster.yaml (aws.yaml, filled in): whoever runs ray up needs the three.
set -euo pipefail
: "${BUCKET:?the bucket of slides and results}" "${SSH_FROM:?your address, as 203.0.113.7/32}"
cd "$(dirname "$0")/.."
export AWS_DEFAULT_REGION="${REGION:=us-east-1}" AWS_PAGER=
ACCOUNT=$(aws sts get-caller-identity --query Account --output text)
REGISTRY=$ACCOUNT.dkr.ecr.$REGION.amazonaws.com
SECRETS=~/.lemon-cluster
umask 077
exists() { "$@" >/dev/null 2>&1; }
random() { python3 -c 'import secrets; print(secrets.token_hex(32), end="")'; }

# Ray's token and the database's password
mkdir -p "$SECRETS" ~/.ssh
[ -s "$SECRETS/auth_token" ] || random >"$SECRETS/auth_token"
[ -s "$SECRETS/password" ] || random >"$SECRETS/password"

# The ssh key: its private half never leaves this machine but for the head, which Ray gives it to reach workers.
[ -s ~/.ssh/lemon ] || ssh-keygen -q -t ed25519 -N '' -C lemon -f ~/.ssh/lemon
exists aws ec2 describe-key-pairs --key-names lemon ||
  aws ec2 import-key-pair --key-name lemon --public-key-material "fileb://$HOME/.ssh/lemon.pub"

# One security group: nodes and database among themselves, and ssh from SSH_FROM.
VPC=${VPC:-$(aws ec2 describe-vpcs --filters Name=is-default,Values=true --query 'Vpcs[0].VpcId' --output text)}
group() {
  aws ec2 describe-security-groups --filters Name=group-name,Values=lemon "Name=vpc-id,Values=$VPC" \
    --query 'SecurityGroups[0].GroupId' --output text
}
GROUP=$(group)
if [ "$GROUP" = None ]; then
  GROUP=$(aws ec2 create-security-group --group-name lemon --description lemon --vpc-id "$VPC" --query GroupId --output text)
  aws ec2 authorize-security-group-ingress --group-id "$GROUP" --protocol -1 --source-group "$GROUP"
  aws ec2 authorize-security-group-ingress --group-id "$GROUP" --protocol tcp --port 22 --cidr "$SSH_FROM"
fi

# Roles: a worker has the bucket and the image; the head also starts and ends workers; so may the group of operators,
# who push images and back up the runs. Spot needs a role of AWS's own, which an account has after its first spot node.
filled() {
  sed -e "s/EDIT_BUCKET/$BUCKET/g; s/EDIT_REGION/$REGION/g; s/EDIT_ACCOUNT/$ACCOUNT/g; s/EDIT_GROUP/$GROUP/g" "$1"
}
for role in lemon-head lemon-worker; do
  exists aws iam get-role --role-name "$role" ||
    aws iam create-role --role-name "$role" --assume-role-policy-document file://cluster/iam/trust.json
  aws iam put-role-policy --role-name "$role" --policy-name node --policy-document "$(filled cluster/iam/node.json)"
  exists aws iam get-instance-profile --instance-profile-name "$role" || {
    aws iam create-instance-profile --instance-profile-name "$role"
    aws iam add-role-to-instance-profile --instance-profile-name "$role" --role-name "$role"
  }
done
exists aws iam get-group --group-name lemon-operators || aws iam create-group --group-name lemon-operators
LAUNCH=$(filled cluster/iam/launch.json)
aws iam put-role-policy --role-name lemon-head --policy-name launch --policy-document "$LAUNCH"
aws iam put-group-policy --group-name lemon-operators --policy-name launch --policy-document "$LAUNCH"
aws iam put-group-policy --group-name lemon-operators --policy-name operator \
  --policy-document "$(filled cluster/iam/operator.json)"
exists aws iam create-service-linked-role --aws-service-name spot.amazonaws.com || true

# Where the image goes
exists aws ecr describe-repositories --repository-names lemon || aws ecr create-repository --repository-name lemon

# MLflow's database. It outlives the cluster: backed up daily for two weeks, and not deleted without being asked twice.
exists aws rds describe-db-instances --db-instance-identifier lemon-mlflow ||
  aws rds create-db-instance --db-instance-identifier lemon-mlflow --engine postgres --db-name mlflow \
    --db-instance-class db.t4g.micro --allocated-storage 20 --storage-type gp3 --storage-encrypted \
    --master-username mlflow --master-user-password "file://$SECRETS/password" \
    --vpc-security-group-ids "$GROUP" --no-publicly-accessible --backup-retention-period 14 --deletion-protection
aws rds wait db-instance-available --db-instance-identifier lemon-mlflow
DATABASE=$(aws rds describe-db-instances --db-instance-identifier lemon-mlflow \
  --query 'DBInstances[0].Endpoint.Address' --output text)
printf '%s:5432:mlflow:mlflow:%s\n' "$DATABASE" "$(cat "$SECRETS/password")" >"$SECRETS/pgpass"

# Driver, Docker and the NVIDIA container toolkit on Ubuntu
AMI=${AMI:-$(aws ssm get-parameter --query Parameter.Value --output text --name \
  /aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id)}
IMAGE=${IMAGE:-$REGISTRY/lemon:$(git rev-parse --short HEAD)}
sed -e "s/ami-EDIT/$AMI/; s/sg-EDIT/$GROUP/; s/EDIT_BUCKET/$BUCKET/; s/EDIT_REGION/$REGION/g; s/EDIT_DATABASE/$DATABASE/" \
  -e "s#EDIT_REGISTRY#$REGISTRY#; s#EDIT_IMAGE#$IMAGE#" cluster/aws.yaml >~/.lemon-cluster.yaml
echo "wrote ~/.lemon-cluster.yaml; image: $IMAGE"
