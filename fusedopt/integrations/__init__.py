"""What single frameworks need beside the optimizer. Each module needs its framework, and nothing
else imports it."""
