"""Networks, generators and checks that several tests share."""
