"""DeepSpeed ZeRO and its kin: planning memory and cost, writing configurations, and models cut over many ranks."""
